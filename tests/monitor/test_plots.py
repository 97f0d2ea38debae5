from __future__ import annotations

from pathlib import Path

from PIL import Image

from flexpert.monitor.plots import learning_curve, load_map


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert picture.size[0] > 200
        return len(picture.convert("RGB").getcolors(maxcolors=1 << 24))


def test_both_plots_are_pictures_with_something_on_them(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1 / step, "accuracy": 0.5} for step in range(1, 20)]
    learning_curve(lines, tmp_path / "curve.png", score=0.9)
    load_map({"first": [0.25, 0.75], "second": [0.2, 0.2, 0.6]}, tmp_path / "load.png")
    assert colours(tmp_path / "curve.png") > 20
    assert colours(tmp_path / "load.png") > 20
