"""Seeds for purposes, and weights that depend on their expert alone."""

from __future__ import annotations

from functools import partial

import torch

from flexpert.core.seeding import (
    Drawn,
    derive_seed,
    draw_base,
    draw_normal,
    draw_trunc_normal,
    draw_uniform,
)


def test_derived_seeds_are_fixed_for_ever():
    """A change of these would change the initial weights of every seed anybody has noted."""
    assert derive_seed(0, "gate") == 6717977621124911960
    assert derive_seed(12345, 3, "w1") == 5561752551617056174


def test_derived_seeds_differ_and_fit_a_generator():
    seeds = {
        derive_seed(base, expert, name) for base in (0, 1) for expert in range(50) for name in ("w1", "w2")
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_base_comes_from_the_global_generator():
    torch.manual_seed(3)
    first, second = draw_base(), draw_base()
    assert first != second
    torch.manual_seed(3)
    assert draw_base() == first


def test_an_expert_is_drawn_whole_from_its_own_generator():
    weights = torch.empty(5, 4, 3)
    Drawn(7, "w1", draw_normal).fill(weights)
    for expert in (0, 3):
        generator = torch.Generator().manual_seed(derive_seed(7, expert, "w1"))
        assert torch.equal(weights[expert], torch.empty(4, 3).normal_(generator=generator))
    other = torch.empty(5, 4, 3)
    Drawn(7, "w2", draw_normal).fill(other)
    assert not torch.equal(weights, other)


def test_dtypes_hold_the_same_values():
    full, half = torch.empty(2, 6), torch.empty(2, 6, dtype=torch.bfloat16)
    for weights in (full, half):
        Drawn(7, "w1", draw_normal).fill(weights)
    assert torch.equal(full.bfloat16(), half)


def test_parameters_and_meta_tensors():
    parameter = torch.nn.Parameter(torch.empty(2, 3))
    Drawn(0, "w1", draw_normal).fill(parameter)
    assert parameter.requires_grad
    Drawn(0, "w1", draw_normal).fill(torch.empty(2, 3, device="meta"))


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Drawn(0, "w1", partial(draw_trunc_normal, std=1.0)).fill(torch.empty(3, 100))
    assert torch.equal(before, torch.get_rng_state())


def test_distributions():
    weights = torch.empty(1, 50_000)
    Drawn(0, "w", partial(draw_uniform, bound=0.5)).fill(weights)
    assert 0.4999 < weights.abs().max() <= 0.5
    assert abs(weights.std() - 0.5 / 3**0.5) < 0.005
    Drawn(0, "w", partial(draw_normal, std=2.0)).fill(weights)
    assert abs(weights.std() - 2) < 0.03
    Drawn(0, "w", partial(draw_trunc_normal, std=2.0)).fill(weights)
    assert 3.9 < weights.abs().max() <= 4
