"""What a saved model's card says."""

from __future__ import annotations

import pytest

from flexpert.convert import Importance, convert, save


@pytest.mark.parametrize(
    ("name", "call"), [("llama", 'load("path/to/this/folder")'), ("plain", ", dense_model)")]
)
def test_card(make_case, tmp_path, name, call):
    case = make_case(name)
    report = convert(case.model, case.glob, Importance(num_experts=5, num_shared=3), calibration=[case.batch])
    save(case.model, tmp_path / "m")
    text = (tmp_path / "m/README.md").read_text()
    assert call in text
    assert (
        f"{report.after.params:,} parameters, of which a token meets {report.after.active_params:,}" in text
    )
    for mlp in report.layers:
        assert f"| {mlp} | importance | 5 of 3 | 5 | 3 |" in text
