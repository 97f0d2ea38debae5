"""Rows of the paper: what is claimed of them holds, and the closed form is what PyTorch allocates."""

from __future__ import annotations

import weakref
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexpert.core.errors import ConfigError
from flexpert.simulate.paper import TABLES, pipelining, reproduce
from flexpert.simulate.paper.memory import DENSE, dense_bytes
from flexpert.simulate.paper.rows import Row

ROW = {"name", "paper", "ours", "error", "unit", "note"}


reproduced = cache(reproduce)


@pytest.mark.parametrize("name", ["T2", "T5", "F12", "F14", "F18"])
def test_claims_hold(name):
    table = reproduced(name)
    assert table["row"] == name
    assert all(row.keys() == ROW for row in table["rows"])
    assert table["claims"]
    assert all(claim["holds"] for claim in table["claims"]), table["claims"]
    for row in table["rows"]:
        assert (row["error"] is None) == (row["paper"] is None)


def errors(name):
    return {row["name"]: row["error"] for row in reproduced(name)["rows"] if row["error"] is not None}


def test_errors_stay_within_what_the_page_says():
    """A change of a constant must change docs/simulate.md too."""
    found = errors("T2")
    for ranks, bound in {16: 0.06, 64: 0.06, 256: 0.30}.items():
        assert abs(found[f"{ranks} GPUs: all-to-all"]) < bound
    assert all(abs(error) < 0.21 for name, error in errors("T5").items() if "saving" not in name)
    assert all(abs(error) < 0.25 for name, error in errors("F14").items() if "total" in name)
    found = errors("F12")
    assert all(abs(error) < 0.35 for error in found.values())
    (crossing,) = errors("F18").values()
    assert abs(crossing) < 0.3


@pytest.mark.parametrize("ranks", [16, 256])
def test_the_best_algorithm_of_the_pipelining_tables(ranks, monkeypatch):
    """A fourth of the grid; the whole one is in benchmarks/simulate."""
    monkeypatch.setattr(pipelining, "GRID", pipelining.GRID[::4])
    gains = pipelining.gains.__wrapped__(ranks)
    assert len(gains) == 8
    best = min(gains, key=lambda choice: gains[choice][0])
    assert best[0] == ("linear" if ranks == 16 else "2dh")
    assert all(worst >= mean >= 0 for mean, worst in gains.values())


def test_errors_of_rows():
    assert Row(name="a", paper=2.0, ours=3.0, unit="x").error == 0.5
    assert Row(name="a", paper=20.0, ours=30.0, unit="%").error == 10.0
    assert Row(name="a", paper=None, ours=30.0, unit="x").error is None
    assert pipelining.kendall([1, 2, 3], [10, 20, 30]) == 1
    assert pipelining.kendall([1, 2, 3], [30, 20, 10]) == -1


def test_unknown_rows_are_refused():
    with pytest.raises(ConfigError, match="paper: unknown row 'T7'"):
        reproduce("T7")
    assert set(TABLES) == {"T2", "T5", "T6a", "T6b", "F12", "F14", "F18"}


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage.data_ptr() and storage._cdata not in self.known:
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.live += size
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.live -= size


def test_dense_tensors_alive_in_a_layer_of_einsums():
    """GShard's formulation, top-2: how many (T, E, C) tensors of fp32 PyTorch needs at once."""
    tokens, experts, dim = 256, 2, 4
    capacity = tokens
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, dim, requires_grad=True)
    gate_TE = torch.softmax(torch.randn(tokens, experts, requires_grad=True), -1)
    place_TC = torch.nn.functional.one_hot(torch.arange(tokens), capacity).float()
    with Peak() as peak:
        combine_TEC = (
            gate_TE[:, :, None] * place_TC[:, None] + gate_TE.flip(1)[:, :, None] * place_TC[:, None]
        )
        mask_TEC = combine_TEC.bool().float()
        sent_ECD = torch.einsum("tec,td->ecd", mask_TEC, x_TD)
        y_TD = torch.einsum("tec,ecd->td", combine_TEC, sent_ECD * 2)
        y_TD.sum().backward()
    dense = dense_bytes(tokens, experts, capacity) / DENSE
    assert abs(peak.most / dense - DENSE) < 1
