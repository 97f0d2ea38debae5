"""The loops refuse what they do not know; that they are right is for the tests of parity."""

from __future__ import annotations

import pytest
import torch

from flexpert import InputError, MoE, MoEConfig
from flexpert.testing import naive_moe


def layer_of(**options):
    return MoE(MoEConfig(**{"model_dim": 3, "hidden_dim": 4, "num_experts": 2, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "soft"}, "SoftRouter: the loops know top-k by a linear, cosine or hash score"),
        ({"router": {"name": "linear", "selection": "random"}}, "LinearRouter: the loops know top-k"),
        ({"router": {"name": "linear", "gate_noise": 1.0}}, r"the loops draw no noise: call layer.eval\(\)"),
    ],
)
def test_the_loops_refuse_what_they_do_not_know(options, message):
    with pytest.raises(InputError, match=message):
        naive_moe(layer_of(**options), torch.randn(5, 3))
