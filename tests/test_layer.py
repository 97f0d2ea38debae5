"""The layer as a module: shapes, dtypes, extremes, copies, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from flexpert import CheckpointError, InputError, RoutingContext
from flexpert.testing import assert_close
from tests.layers import ROUTERS, D, E, context_for, data, make_layer

# Shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leading", [(), (1,), (12,), (3, 4), (2, 3, 2), (1, 1, 12), (0,), (0, 3), (3, 0), (2, 0, 3)]
)
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_leading_dimensions(leading, capacity_factor):
    layer = make_layer(capacity_factor=capacity_factor, output_dim=3)
    x = data(*leading)
    y, info = layer(x, context=context_for(x), return_info=True)
    assert y.shape == (*leading, 3)
    assert_close(y.reshape(-1, 3), layer(x.reshape(-1, D)))
    assert info.stats.tokens == x[..., 0].numel()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(router, tokens):
    drops = (
        [{}]
        if router in ("soft", "expert_choice")
        else [{"capacity_factor": f} for f in (None, 0.0, 1.0, -0.1)]
    )
    for options in drops:
        layer = make_layer(router, losses=["balance"], **options)
        x = data(tokens).requires_grad_()
        y, info = layer(x, context=context_for(x), return_info=True)
        assert y.shape == (tokens, D)
        assert info.losses["balance"].isfinite()
        (y.sum() + info.losses["balance"]).backward()
        assert x.grad.shape == (tokens, D)
        assert info.stats.dropped == 0
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                assert tokens or parameter.grad.count_nonzero() == 0, name


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "soft"])
def test_one_expert_is_a_dense_layer(router):
    options = {"capacity_factor": 1.0} if router == "expert_choice" else {"renormalize": "always"}
    layer = make_layer(router, num_experts=1, top_k=1, **options).eval()
    x = data(7)
    experts = layer.experts
    dense = nn.functional.gelu(x @ experts.w1[0].T + experts.b1[0]) @ experts.w2[0].T + experts.b2[0]
    assert_close(layer(x, context=context_for(x)), dense)


def test_all_tokens_to_one_expert():
    layer, x = make_layer(top_k=1), data(40)
    mask = torch.zeros(E, dtype=torch.bool)
    mask[3] = True
    y, info = layer(x, context=RoutingContext(expert_mask=mask), return_info=True)
    assert info.stats.load_E.tolist() == [0, 0, 0, 40, 0]
    y.sum().backward()
    used = layer.experts.w1.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == mask.tolist()  # zeros, not None, for those that had nothing to do


@pytest.mark.parametrize("fused", [True, False])
def test_strided_and_expanded_inputs(fused):
    layer = make_layer()
    layer.transport.fused = fused
    base = torch.randn(9, 2 * D)
    for x in (base[:, ::2], base[::2, :D], base[:, :D].T.contiguous().T, base[:1, :D].expand(9, D)):
        assert_close(layer(x), layer(x.contiguous()))
    x = torch.randn(3, 4, D).transpose(0, 1)
    assert_close(layer(x), layer(x.contiguous()))


# State -----------------------------------------------------------------------------------------------


def snapshot(layer):
    """Everything that hangs on the layer and its parts."""
    return {
        (name, key): (id(value), value._version if isinstance(value, torch.Tensor) else repr(value))
        for name, module in layer.named_modules()
        for key, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if not key.startswith("_")
    }


@pytest.mark.parametrize("router", ROUTERS)
def test_forward_writes_nothing_to_the_layer(router):
    layer, x = make_layer(router), data(9)
    before = snapshot(layer)
    overrides = {} if router == "soft" else {"top_k": 3, "capacity_factor": 0.5}
    layer(x, context=context_for(x), return_info=True, **overrides)
    layer(x, context=context_for(x)).sum().backward()
    assert snapshot(layer) == before


@pytest.mark.parametrize("router", ROUTERS)
def test_overrides_do_not_stick(router):
    layer, x = make_layer(router), data(20)
    y = layer(x, context=context_for(x))
    if router != "soft":
        other = layer(x, context=context_for(x), top_k=4, capacity_factor=0.3)
        assert router == "random" or not torch.equal(other, y)
    assert torch.equal(layer(x, context=context_for(x)), y)


@pytest.mark.parametrize("router", ["linear", "cosine", "top_p", "hash", "expert_choice", "soft", "noisy"])
def test_forward_leaves_the_global_generator_alone(router):
    layer, x = make_layer(router), data(9)
    before = torch.get_rng_state()
    layer(x, context=context_for(x)).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("router", ROUTERS)
def test_state_dict_round_trip(router):
    layer, twin, x = make_layer(router), make_layer(router), data(9)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    context = context_for(x)
    layer.eval(), twin.eval()
    result = twin.load_state_dict(layer.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    if router != "random":  # whose draws are those of the layer, not of its state
        assert torch.equal(twin(x, context=context), layer(x, context=context))


def test_a_state_of_another_shape_is_refused_before_anything_is_copied():
    layer, other = make_layer(), make_layer(num_experts=E + 1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"router.weight has shape \(6, 6\) in the checkpoint, \(5, 6\) in this layer"
    ):
        layer.load_state_dict(other.state_dict())
    state = {f"1.{name}": value for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1\.router\.weight has shape"):
        nn.Sequential(nn.Identity(), layer).load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("router", ROUTERS)
def test_deepcopy(router):
    layer, x = make_layer(router), data(9)
    context = context_for(x)
    y = layer(x, context=context)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, context=context), y)
    with torch.no_grad():
        twin.experts.w1.zero_()
    assert torch.equal(layer(x, context=context), y)


def test_a_layer_is_freed():
    layer = make_layer("noisy", capacity_factor=1.0)
    layer(data(9), return_info=True)[0].sum().backward()
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("router", ROUTERS)
def test_without_gradients(router):
    layer, x = make_layer(router), data(9)
    y = layer(x, context=context_for(x))
    with torch.no_grad():
        assert_close(layer(x, context=context_for(x)), y)
    with torch.inference_mode():
        assert_close(layer(x, context=context_for(x)), y)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    x.requires_grad_()
    layer(x, context=context_for(x)).sum().backward()  # into the tokens alone
    assert x.grad.norm() > 0


def test_frozen_parts():
    layer, x = make_layer(), data(9)
    layer.experts.w1.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.experts.w1.grad is None
    assert layer.experts.w2.grad.norm() > 0
    assert layer.router.weight.grad.norm() > 0


# Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, D + 1), r"x has shape \(3, 7\); expected \(\.\.\., model_dim=6\)"),
        (torch.randn(()), r"x has shape \(\); expected"),
        (torch.randn(3, D).t(), r"x has shape \(6, 3\)"),
        (
            torch.ones(3, D).long(),
            r"x has dtype torch.int64; expected a floating dtype \(convert with x.float\(\)\)",
        ),
        (torch.ones(3, D).bool(), "x has dtype torch.bool"),
        (torch.ones(3, D, dtype=torch.complex64), "x has dtype torch.complex64"),
        (
            torch.ones(3, D, device="meta"),
            r"x is on meta, the layer on cpu; move one of them with .to\(device\)",
        ),
        ([[1.0] * D], "x is a list; expected a tensor"),
        (None, "x is a NoneType; expected a tensor"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    with pytest.raises(InputError, match=message):
        make_layer()(x)


def test_negative_capacity_is_refused_where_it_means_nothing():
    layer = make_layer("expert_choice")
    with pytest.raises(InputError, match="capacity_factor=-0.5: expert choice fills its experts"):
        layer(data(4), capacity_factor=-0.5)


# Evaluation of a trained layer -----------------------------------------------------------------------


def test_capacity_and_top_k_can_change_at_evaluation():
    layer = make_layer(capacity_factor=1.25, batch_prioritized=True, top_k=1)
    x = data(50)
    layer(x).square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(parameter.grad, alpha=0.01)
    layer.eval()
    dropped = []
    for factor in (0.25, 0.5, 1.0, None):
        _, info = layer(x, capacity_factor=factor, return_info=True)
        dropped.append(info.stats.dropped.item())
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > dropped[-1] == 0
    _, info = layer(x, top_k=3, capacity_factor=None, return_info=True)
    assert info.stats.load_E.sum() == 150


def test_fused_only_where_it_is_the_same():
    assert make_layer().transport.fused
    assert not make_layer(combine="weighted_input").transport.fused
    assert not make_layer("soft").transport.fused
    assert make_layer("expert_choice").transport.fused
