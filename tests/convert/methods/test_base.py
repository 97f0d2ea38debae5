"""What all methods share."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError
from flexpert.convert import METHODS, Clone, Granular, Importance, Slice


def test_every_method_has_its_name():
    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}
    assert sorted(METHODS) == ["clone", "granular", "importance", "slice"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clone(num_experts=2, router="noisy"), "router='noisy': expected 'random' or 'zero'"),
        (lambda: Clone(num_experts=2, router_std=0), "router_std=0: expected a finite number > 0"),
        (lambda: Clone(num_experts=0), "num_experts=0: expected an integer >= 1"),
        (lambda: Clone(num_experts=2, top_k=3), "top_k=3: expected an integer, 1 <= top_k <= num_experts=2"),
        (lambda: Clone(num_experts=2, redraw=1.5), "redraw=1.5: expected a share of the neurons, 0 to 1"),
        (lambda: Clone(num_experts=2, perturb=-1), "perturb=-1: expected a finite number >= 0"),
        (lambda: Granular(copies=0, pieces_per_copy=2), "copies=0"),
        (lambda: Granular(copies=2, pieces_per_copy=0), "pieces_per_copy=0"),
        (lambda: Slice(num_experts=4, top_k=5), "top_k=5"),
        (lambda: Importance(num_experts=4, num_shared=0), "num_shared=0: expected an integer >= 1"),
    ],
)
def test_values_that_no_mlp_could_be_converted_with(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Clone(num_experts=2), None),
        (
            Clone(num_experts=2, perturb=0.1, redraw=0.5),
            "perturb=0.1 and redraw=0.5 changed the experts' weights",
        ),
        (Granular(copies=2, pieces_per_copy=2), None),
        (Granular(copies=2, pieces_per_copy=2, router="zero"), "pieces of several may meet"),
        (Slice(num_experts=4), None),
        (Slice(num_experts=4, top_k=2), "a token meets 2 of the 4 slices"),
        (Importance(num_experts=4), None),
        (Importance(num_experts=4, top_k=3), "a token meets 3 of the 4 experts besides the shared one"),
        (Importance(num_experts=4, router="random"), "weighs the experts by 1"),
    ],
)
def test_what_is_exact_and_why_not(method, reason):
    if reason is None:
        assert method.why_not_exact is None
    else:
        assert reason in method.why_not_exact


def test_rows():
    generator = torch.Generator().manual_seed(0)
    assert Clone(num_experts=3, router="zero").rows(3, 5, generator).count_nonzero() == 0
    rows = Clone(num_experts=3, router_std=0.5).rows(200, 50, generator)
    assert float(rows.std()) == pytest.approx(0.5, rel=0.05)
