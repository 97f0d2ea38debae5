"""The context of a call: flattened, checked, overridden."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexpert import UNSET, InputError, MoE, MoEConfig, RoutingContext
from flexpert.core.unset import pick


def test_per_token_tensors_are_flattened():
    mask = torch.rand(2, 3) > 0.5
    ids = torch.arange(6).view(2, 3)
    context = RoutingContext(mask=mask, token_ids=ids, modality_ids=ids.flatten()).for_tokens((2, 3))
    assert torch.equal(context.mask, mask.flatten())
    assert torch.equal(context.token_ids, ids.flatten())
    assert torch.equal(context.modality_ids, ids.flatten())
    assert context.sequence_length == 3


@pytest.mark.parametrize(
    ("leading", "length"), [((), None), ((6,), None), ((2, 3), 3), ((4, 2, 3), 3), ((0, 3), 3), ((2, 0), 0)]
)
def test_sequence_length_is_that_of_the_input(leading, length):
    assert RoutingContext().for_tokens(leading).sequence_length == length
    assert RoutingContext(sequence_length=2).for_tokens(leading).sequence_length == 2


@pytest.mark.parametrize("mask", [torch.ones(5, dtype=torch.bool), torch.ones(2, 4, 5, dtype=torch.bool)])
def test_expert_masks(mask):
    flat = RoutingContext(expert_mask=mask).for_tokens((2, 4)).expert_mask
    assert flat.shape == ((5,) if mask.dim() == 1 else (8, 5))


def test_one_token_without_leading_dimensions():
    layer = MoE(MoEConfig(model_dim=3, hidden_dim=4, num_experts=2))
    context = RoutingContext(mask=torch.tensor(False))
    assert layer(torch.randn(3), context=context).count_nonzero() == 0


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"mask": torch.ones(5, dtype=torch.bool)},
            r"mask has shape \(5,\), but the layer's tokens have \(2, 3\)",
        ),
        (
            {"mask": torch.ones(3, 2, dtype=torch.bool)},
            r"mask has shape \(3, 2\), but the layer's tokens have",
        ),
        (
            {"mask": torch.ones(2, 3)},
            "mask has dtype torch.float32; expected torch.bool with True for a real token",
        ),
        ({"token_ids": torch.ones(7).long()}, r"token_ids has shape \(7,\).*give one value per token"),
        ({"token_ids": torch.ones(2, 3)}, "token_ids has dtype torch.float32; expected torch.int64"),
        (
            {"modality_ids": torch.ones(2, 3).bool()},
            "modality_ids has dtype torch.bool; expected torch.int64",
        ),
        ({"expert_mask": torch.ones(4)}, "expert_mask has dtype torch.float32; expected torch.bool"),
        (
            {"expert_mask": torch.ones(3, 2, 4).bool()},
            r"expert_mask has shape \(3, 2, 4\); expected \(4,\) or",
        ),
        ({"num_groups": 4}, "num_groups=4 must be at least 1 and divide the call's 6 tokens"),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0: expected at least 1"),
        ({"samples": (0, 4)}, r"samples=\(0, 4\): the call's 6 tokens cannot be 4 samples"),
        ({"samples": (2, 2)}, r"samples=\(2, 2\): the call's 6 tokens cannot be 0 samples"),
        ({"samples": (3, 1)}, r"samples=\(3, 1\): expected 0 <= first <= end"),
        ({"samples": (-2, 0)}, r"samples=\(-2, 0\): expected 0 <= first <= end"),
        ({"samples": 3}, r"samples=3: expected two integers \(first, end\)"),
        ({"samples": (0, 1, 2)}, r"samples=\(0, 1, 2\): expected two integers"),
        ({"samples": (None, 2)}, r"samples=\(None, 2\): expected two integers"),
        ({"samples": (0.0, 2.0)}, r"samples=\(0.0, 2.0\): expected two integers"),
    ],
)
def test_what_does_not_fit(facts, message):
    layer = MoE(MoEConfig(model_dim=3, hidden_dim=4, num_experts=4))
    with pytest.raises(InputError, match=message):
        layer(torch.randn(2, 3, 3), context=RoutingContext(**facts))


@pytest.mark.parametrize(
    ("samples", "tokens", "first"),
    [(None, 6, 0), ((0, 3), 6, 0), ((4, 7), 6, 8), ((4, 4), 0, 0), ((4, 6), 0, 0)],
)
def test_place_of_the_first_token(samples, tokens, first):
    context = RoutingContext(samples=samples).for_tokens((tokens,))
    assert context.first_token(tokens) == first


def test_overrides():
    context = RoutingContext(top_k=2)
    assert context.with_overrides() is context
    assert context.with_overrides(top_k=3).top_k == 3
    changed = context.with_overrides(capacity_factor=None)
    assert (changed.top_k, changed.capacity_factor) == (2, None)
    assert context.capacity_factor is UNSET


def test_none_means_none():
    assert pick(None, 3) is None
    assert pick(UNSET, 3) == 3
    layer = MoE(MoEConfig(model_dim=3, hidden_dim=4, num_experts=2, capacity_factor=0.1))
    x = torch.randn(30, 3)
    dropped = [
        layer(x, return_info=True, **given)[1].stats.dropped.item()
        for given in ({}, {"capacity_factor": None}, {"context": RoutingContext(capacity_factor=None)})
    ]
    assert dropped[0] > 0
    assert dropped[1:] == [0, 0]


def test_arguments_win_over_the_context():
    layer = MoE(MoEConfig(model_dim=3, hidden_dim=4, num_experts=4))
    context = RoutingContext(top_k=2, capacity_factor=0.1)
    _, info = layer(torch.randn(8, 3), context=context, top_k=3, capacity_factor=None, return_info=True)
    assert info.routing.counts_E.sum() == 24


def test_padding_is_hidden():
    x = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 4.0]])
    context = RoutingContext(mask=torch.tensor([True, False, True]))
    assert context.hide_padding(x).tolist() == [[1, 2], [0, 0], [3, 4]]
    assert RoutingContext().hide_padding(x) is x


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoutingContext().top_k = 2
