"""The choice of a backend: reported, forced in tests, never silent."""

from __future__ import annotations

import pytest
import torch

from flexpert import ops
from flexpert.core.errors import ConfigError, InputError
from flexpert.ops import select


@pytest.fixture
def call(make_case):
    case = make_case()
    return lambda: ops.grouped_mlp(*case.args)


def test_report_names_one_live_backend_for_every_operator():
    rows = ops.report()
    operators = {row["operator"] for row in rows}
    assert {"assign", "gather_rows", "grouped_linear", "scatter_combine", "grouped_mlp"} <= operators
    for operator in operators:
        assert sum(row["live"] for row in rows if row["operator"] == operator) == 1
    assert all(row["why"] for row in rows)


def test_report_tells_why_nothing_is_live():
    rows = [row for row in ops.report(dtype=torch.int32) if row["operator"] == "grouped_mlp"]
    assert not any(row["live"] for row in rows)
    assert any("torch.int32 is not a floating point type" in row["why"] for row in rows)


def test_reference_replaces_whole_operators(call, monkeypatch):
    monkeypatch.setattr(select.reference, "grouped_mlp", lambda *args: "naive")
    with ops.use_backend("reference"):
        assert call() == "naive"
    assert call() != "naive"


def test_forced_backend_runs_and_is_left(call, monkeypatch):
    def refuse(facts):
        return "never" if facts.operator == "grouped_mlp" else None

    picky = select.Backend(name="picky", kernels=select.PORTABLE.kernels, verify=refuse)
    monkeypatch.setattr(select, "BACKENDS", [picky, select.PORTABLE])
    want = call()
    with (
        ops.use_backend("picky"),
        pytest.raises(InputError, match="no backend runs grouped_mlp .*picky: never"),
    ):
        call()
    assert torch.equal(call(), want)
    refused = [row for row in ops.report() if row["operator"] == "grouped_mlp"]
    assert refused[0] == {"operator": "grouped_mlp", "backend": "picky", "live": False, "why": "never"}
    assert refused[1]["live"]


def test_unknown_backend_lists_the_options():
    options = "reference, portable, grouped_mm, native"
    with (
        pytest.raises(ConfigError, match=f"backend='cuda' is unknown; choose one of: {options}"),
        ops.use_backend("cuda"),
    ):
        pass


def test_integer_input_is_refused_by_name():
    with pytest.raises(InputError, match="gather_rows on cpu in torch.int64"):
        ops.gather_rows(torch.ones(2, 2, dtype=torch.int64), torch.tensor([0]), torch.tensor([1]))


@pytest.fixture
def half(monkeypatch):
    """A backend with a kernel for one operator, which refuses fp64; it is not the first one."""
    kernels = {"gather_rows": lambda x, unit, counts: torch.full((len(unit), x.shape[1]), 7.0)}
    backend = select.Backend(
        name="half", kernels=kernels, verify=lambda facts: "no fp64" if facts.dtype == torch.float64 else None
    )
    monkeypatch.setattr(select, "BACKENDS", [*select.BACKENDS, backend])
    return backend


def test_a_named_backend_runs_its_kernels_and_others_the_rest(half):
    x, unit, counts = torch.ones(2, 2), torch.tensor([0]), torch.tensor([1])
    with ops.use_backend("half"):
        assert torch.equal(ops.gather_rows(x, unit, counts), torch.full((1, 2), 7.0))
        assert torch.equal(ops.scatter_combine(x[:1], unit, None, counts, 1, x.dtype), x[:1])
        order, _ = ops.assign(torch.tensor([1, 0]), 2)
        assert order.tolist() == [1, 0]
    assert torch.equal(ops.gather_rows(x, unit, counts), x[:1])


def test_a_named_backend_refuses_with_its_reason(half):
    x = torch.ones(2, 2, dtype=torch.float64)
    with (
        ops.use_backend("half"),
        pytest.raises(InputError, match="gather_rows .*portable: use_backend names half.*half: no fp64"),
    ):
        ops.gather_rows(x, torch.tensor([0]), torch.tensor([1]))


def test_report_inside_use_backend(half):
    usual = {(row["operator"], row["backend"]): row for row in ops.report()}
    with ops.use_backend("half"):
        rows = ops.report()
    for row in rows:
        if row["operator"] != "gather_rows":
            assert row == usual[row["operator"], row["backend"]]
    mine = {row["backend"]: row for row in rows if row["operator"] == "gather_rows"}
    assert mine["half"]["live"]
    assert mine["half"]["why"] == "use_backend names it"
    assert mine["portable"]["why"] == "use_backend names half"
    assert [row["backend"] for row in mine.values() if row["live"]] == ["half"]
