"""The scope "global": values and gradients on several ranks are those of one process with the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch

from flexpert import ConfigError, MoE, MoEConfig, RoutingContext
from flexpert.losses import balance_first_choice, entropy, importance_load, z_loss
from flexpert.testing import assert_close
from tests.ranks import run_ranks

D, S = 5, 3
NOISY = {"name": "linear", "gate_noise": 4.0}
TERMS = ["balance", "balance_first_choice", "importance_load", "z", "entropy"]
CUTS = {"even": [0, 4, 8, 12], "uneven": [0, 1, 8, 12], "empty": [0, 5, 5, 12], "first_empty": [0, 0, 12, 12]}


def make_layer(scope, name, router=NOISY):
    torch.manual_seed(0)
    spec = {"name": name, "scope": scope, "label": "term"}
    config = MoEConfig(model_dim=D, hidden_dim=4, num_experts=4, top_k=2, router=router, losses=[spec])
    return MoE(config).double()


def gradients(layer, x):
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}


def one_process(name, x, mask, router=NOISY, scope="micro_batch"):
    layer, x = make_layer(scope, name, router), x.clone().requires_grad_()
    _, info = layer(x, context=RoutingContext(step=3, mask=mask), return_info=True)
    info.losses["term"].backward()
    return info.losses["term"].detach(), gradients(layer, x)


def several_ranks(name, x, mask, cuts, router=NOISY):
    """The losses of all ranks, and gradients averaged over them."""
    size = len(cuts) - 1
    layers = [copy.deepcopy(make_layer("global", name, router)) for _ in range(size)]

    def work(rank, all_reduce):
        first, end = cuts[rank : rank + 2]
        layer, part = layers[rank], x[first:end].clone().requires_grad_()
        context = RoutingContext(
            step=3,
            samples=(first, end),
            mask=None if mask is None else mask[first:end],
            all_reduce=all_reduce,
        )
        _, info = layer(part, context=context, return_info=True)
        info.losses["term"].backward()
        return info.losses["term"].detach(), gradients(layer, part)

    losses, grads = zip(*run_ranks(size, work), strict=True)
    mean = {key: torch.stack([g[key] for g in grads]).mean(0) for key in grads[0] if key != "x"}
    return losses, mean | {"x": torch.cat([g["x"] for g in grads]) / size}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", TERMS)
def test_ranks_are_one_process(name, cuts, masked):
    torch.manual_seed(1)
    x = torch.randn(12, S, D, dtype=torch.float64) * 3
    mask = torch.rand(12, S) > 0.3 if masked else None
    want, want_grads = one_process(name, x, mask)
    losses, grads = several_ranks(name, x, mask, cuts)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert_close(losses[0], want)
    assert grads.keys() == want_grads.keys()
    assert want_grads["router.weight"].norm() > 1e-4
    for key, grad in want_grads.items():
        assert_close(grads[key], grad, name=key, scale=1e-3)


@pytest.mark.parametrize("router", ["expert_choice", "soft", {"name": "linear", "selection": "top_p"}])
def test_routers_without_a_fixed_number_of_choices(router):
    # One sample a rank, so that experts choose, and slots mix, in one process as on three ranks.
    torch.manual_seed(1)
    x = torch.randn(3, S, D, dtype=torch.float64) * 3
    layer = make_layer("micro_batch", "balance", router)
    context = RoutingContext(num_groups=3, sequence_length=S)
    want = layer(x, context=context, return_info=True)[1].losses["term"]
    losses, _ = several_ranks("balance", x, None, [0, 1, 2, 3], router)
    assert_close(losses[0], want)


@pytest.mark.parametrize("name", TERMS)
def test_no_rank_has_tokens(name):
    x = torch.zeros(0, S, D, dtype=torch.float64)
    losses, grads = several_ranks(name, x, None, [0, 0, 0])
    assert losses == (0, 0)
    assert all(grad.count_nonzero() == 0 for grad in grads.values())


@pytest.mark.parametrize("name", TERMS)
def test_one_process_computes_the_micro_batch(name):
    x = torch.randn(4, S, D, dtype=torch.float64)
    want, want_grads = one_process(name, x, None)
    got, grads = one_process(name, x, None, scope="global")
    assert torch.equal(got, want)
    assert all(torch.equal(grads[key], grad) for key, grad in want_grads.items())


@pytest.mark.parametrize("name", TERMS[1:])
def test_scopes_that_a_term_does_not_have(name):
    with pytest.raises(ConfigError, match="scope='sequence': expected one of micro_batch, global"):
        make_layer("sequence", name)
    layer = make_layer("micro_batch", name)
    _, info = layer(torch.randn(4, S, D).double(), return_info=True)
    terms = {term.__name__.removesuffix("_loss"): term for term in (balance_first_choice, entropy)}
    terms |= {"importance_load": importance_load, "z": z_loss}
    with pytest.raises(ConfigError, match="scope='sequence': expected one of micro_batch, global"):
        terms[name](info.routing, RoutingContext(), scope="sequence")
