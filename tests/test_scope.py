"""The channel through models: context in, losses and statistics out, also where forwards are repeated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from flexpert import InputError, MoE, MoEConfig, RoutingContext, routing_scope
from flexpert.testing import assert_close

D, E = 6, 4
NOISY = {"name": "linear", "gate_noise": 4.0}


def make_layer(**options):
    defaults = {"model_dim": D, "hidden_dim": 5, "num_experts": E, "top_k": 2, "losses": ["balance", "z"]}
    return MoE(MoEConfig(**{**defaults, **options})).double()


class Net(nn.Module):
    """Two MoE layers, the second of which is called twice; optionally under activation checkpointing."""

    def __init__(self, reentrant=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(D, D).double()
        # What follows a layer inside a checkpoint makes the recomputation run through the layer's end.
        last = nn.Sequential(make_layer(**options), nn.Tanh())
        self.blocks = nn.ModuleDict({"a": make_layer(**options), "b": last})
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in (self.blocks["a"], self.blocks["b"], self.blocks["b"]):
            x = x + self.run(block, x)
        return x

    def run(self, block, x):
        if self.reentrant is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.reentrant)


KEYS = [("blocks.a", 0), ("blocks.b.0", 0), ("blocks.b.0", 1)]


def data(*shape, seed=1):
    shape = shape or (3, 5)
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(net, loss):
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return dict(zip([name for name, _ in net.named_parameters()], grads, strict=True))


def test_records_each_call_of_each_layer():
    net, x = Net(), data()
    with routing_scope(net) as scope:
        net(x)
    assert list(scope.infos) == list(scope.stats) == list(scope.routings) == KEYS
    assert {name: len(values) for name, values in scope.losses.items()} == {"balance": 3, "z": 3}
    assert scope.losses["balance"].requires_grad
    for key, info in scope.infos.items():
        assert scope.stats[key] is info.stats
        assert scope.routings[key] is info.routing
        assert info.stats.tokens == 15
    assert_close(scope.losses["z"], torch.stack([info.losses["z"] for info in scope.infos.values()]))


def test_context_reaches_every_layer():
    net, x = Net(), data()
    mask = torch.rand(3, 5) > 0.4
    with routing_scope(net, context=RoutingContext(mask=mask, top_k=3)) as scope:
        net(x)
    for info in scope.infos.values():
        assert info.stats.tokens == mask.sum()
        assert info.routing.counts_E.sum() == 3 * mask.sum()


def test_a_lone_layer_is_called_nothing():
    layer, x = make_layer(), data()
    with routing_scope(layer) as scope:
        y = layer(x)
        z, info = layer(x, return_info=True)
    assert list(scope.infos) == [("", 0), ("", 1)]
    assert scope.infos["", 1] is info
    assert torch.equal(y, z)


def test_the_calls_own_context_wins():
    layer, x = make_layer(), data()
    with routing_scope(layer, context=RoutingContext(top_k=3)) as scope:
        layer(x, context=RoutingContext(top_k=1))
        layer(x, top_k=4)
        layer(x)
    assert [int(s.load_E.sum()) // 15 for s in scope.stats.values()] == [1, 4, 3]


def test_nothing_is_recorded_outside():
    net, x = Net(), data()
    with routing_scope(net, context=RoutingContext(top_k=1)) as scope:
        net(x)
    before = len(scope.infos)
    y = net(x)
    assert len(scope.infos) == before
    assert torch.equal(y, Net()(x))
    with routing_scope(net) as other:
        net(x)
    assert len(scope.infos) == len(other.infos) == before


def test_an_error_inside_ends_the_scope():
    net, x = Net(), data()
    with pytest.raises(InputError, match="top_k=9"), routing_scope(net, context=RoutingContext(top_k=9)):
        net(x)
    assert torch.equal(net(x), Net()(x))


def test_nested_scopes():
    net, x = Net(), data()
    with routing_scope(net, context=RoutingContext(top_k=3)) as outer:
        with routing_scope(net.blocks["b"], context=RoutingContext(top_k=1)) as inner:
            net(x)
        net(x)
        with routing_scope(net) as silent:
            net(x)
    assert list(inner.infos) == [("0", 0), ("0", 1)]
    assert [int(s.load_E.sum()) // 15 for s in inner.stats.values()] == [1, 1]
    per_layer = {key: int(s.load_E.sum()) // 15 for key, s in outer.stats.items()}
    assert [per_layer["blocks.a", i] for i in range(3)] == [3, 3, 3]
    assert [per_layer["blocks.b.0", i] for i in range(6)] == [1, 1, 3, 3, 3, 3]
    assert [int(s.load_E.sum()) // 15 for s in silent.stats.values()] == [3, 3, 3]  # inherits the context


def test_losses_are_a_mapping_that_names_what_there_is():
    net = Net()
    with routing_scope(net) as scope:
        net(data())
    assert sorted(scope.losses) == ["balance", "z"]
    assert "balance" in scope.losses
    assert "entropy" not in scope.losses
    assert scope.losses.get("entropy") is None
    assert torch.equal(scope.losses.get("balance"), scope.losses["balance"])
    with pytest.raises(
        InputError, match="no layer of the scope gave a loss 'balnce'; did you mean 'balance'"
    ):
        scope.losses["balnce"]
    with routing_scope(nn.Linear(2, 2)) as empty:
        pass
    assert dict(empty.losses) == empty.stats == {}


def test_copies_are_outside():
    net, x = Net(), data()
    with routing_scope(net, context=RoutingContext(top_k=1)) as scope:
        net(x)
        twin = copy.deepcopy(net)
        twin(x)
        assert len(scope.infos) == 3
    after = copy.deepcopy(net)
    for module in (twin, after):
        assert torch.equal(module(x), Net()(x))


def test_state_is_that_of_the_parameters_alone():
    net = Net()
    names = set(net.state_dict())
    with routing_scope(net):
        net(data())
        assert set(net.state_dict()) == names
    assert set(net.state_dict()) == names
    assert all(p.grad is None for p in net.parameters())


# Repeated forwards -----------------------------------------------------------------------------------


def total(net, x, context):
    """Loss and gradients of the task and of the balance together, and what the scope saw."""
    with routing_scope(net, context=context) as scope:
        loss = net(x).square().mean() + 0.1 * scope.losses["balance"].mean() + 0.01 * scope.losses["z"].sum()
        grads = gradients(net, loss)
    return loss, grads, scope


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("noise", ["none", "step", "global generator"])
def test_checkpointing_changes_nothing(noise, capacity_factor, early_stop):
    options = {"router": "linear" if noise == "none" else NOISY, "capacity_factor": capacity_factor}
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.2
    context = RoutingContext(mask=mask, step=7 if noise == "step" else None)
    results = []
    for reentrant in (None, False):
        net = Net(reentrant, **options)
        torch.manual_seed(5)
        with set_checkpoint_early_stop(early_stop):
            results.append(total(net, data(), context))
    (loss, grads, scope), (loss_c, grads_c, scope_c) = results
    assert torch.equal(loss, loss_c)
    for name, grad in grads.items():
        assert_close(grads_c[name], grad, name=name)
    assert list(scope_c.infos) == KEYS
    for key, routing in scope.routings.items():
        assert torch.equal(scope_c.routings[key].unit_N, routing.unit_N)
    if noise != "none":
        assert not torch.equal(Net(**options).eval()(data()), Net(**options)(data()))  # there was noise


def test_a_generator_cannot_be_asked_twice():
    context = RoutingContext(generator=torch.Generator().manual_seed(0))
    total(Net(router=NOISY), data(), context)
    with pytest.raises(
        InputError, match=r"cannot repeat the noise of a generator; give RoutingContext\(step"
    ):
        total(Net(False, router=NOISY), data(), context)


def test_reentrant_checkpointing_is_refused():
    net, x = Net(True), data()
    with routing_scope(net) as scope:
        loss = net(x).square().mean()
        assert not scope.losses["balance"].requires_grad
        with pytest.raises(InputError, match="reentrant activation checkpointing loses.*use_reentrant=False"):
            loss.backward()


def test_reentrant_checkpointing_has_nothing_to_lose_without_losses():
    net, x = Net(True, losses=[]), data()
    with routing_scope(net) as scope:
        loss = net(x).square().mean()
        loss.backward()
    assert len(scope.infos) == 3
    plain = Net(losses=[])
    plain(x).square().mean().backward()
    for (name, got), parameter in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, parameter.grad, name=name)


def test_backward_after_the_scope_with_a_context_is_refused():
    net, x = Net(False), data()
    with routing_scope(net, context=RoutingContext(top_k=1)) as scope:
        loss = net(x).square().mean() + scope.losses["balance"].mean()
    with pytest.raises(InputError, match=r"routing_scope has ended; call backward\(\) inside the innermost"):
        loss.backward()


def test_backward_after_an_inner_scope_with_a_context_is_refused():
    net, x = Net(False), data()
    with routing_scope(net, context=RoutingContext(top_k=2)):
        with routing_scope(net, context=RoutingContext(top_k=1)):
            loss = net(x).square().mean()
        with pytest.raises(
            InputError, match=r"call backward\(\) inside the innermost `with` that gave a context"
        ):
            loss.backward()


def test_backward_after_an_inner_scope_that_inherits_its_context():
    context = RoutingContext(top_k=1)
    wanted = total(Net(), data(), context)[1]
    net, x = Net(False), data()
    with routing_scope(net, context=context) as outer:
        with routing_scope(net) as scope:
            loss = net(x).square().mean() + 0.1 * scope.losses["balance"].mean()
        loss = loss + 0.01 * outer.losses["z"].sum()
        for name, grad in gradients(net, loss).items():
            assert_close(grad, wanted[name], name=name)


def test_backward_after_the_scope_without_a_context():
    wanted = total(Net(), data(), None)[1]
    net, x = Net(False), data()
    with routing_scope(net) as scope:
        loss = net(x).square().mean() + 0.1 * scope.losses["balance"].mean() + 0.01 * scope.losses["z"].sum()
    for name, grad in gradients(net, loss).items():
        assert_close(grad, wanted[name], name=name)
    assert list(scope.infos) == KEYS


def test_backward_after_the_scope_without_checkpointing():
    net, x, context = Net(), data(), RoutingContext(top_k=1)
    with routing_scope(net, context=context) as scope:
        loss = net(x).square().mean() + 0.1 * scope.losses["balance"].mean() + 0.01 * scope.losses["z"].sum()
    wanted = total(Net(), x, context)[1]
    for name, grad in gradients(net, loss).items():
        assert_close(grad, wanted[name], name=name)


@pytest.mark.parametrize("reentrant", [None, False])
def test_gradient_accumulation(reentrant):
    """Two micro-batches, each with its own scope and half of its loss: the mean of the two gradients."""
    net, parts = Net(reentrant, router=NOISY), [data(seed=1), data(seed=2)]
    for i, x in enumerate(parts):
        with routing_scope(net, context=RoutingContext(step=torch.tensor(i))) as scope:
            loss = net(x).square().mean() + 0.1 * scope.losses["balance"].mean()
            (loss / 2).backward()
        assert len(scope.infos) == 3
    separate = []
    for i, x in enumerate(parts):
        alone = Net(router=NOISY)
        # The layers draw their seeds from the global generator: those of `net` again.
        with routing_scope(alone, context=RoutingContext(step=i)) as scope:
            loss = alone(x).square().mean() + 0.1 * scope.losses["balance"].mean()
            separate.append(gradients(alone, loss))
    for name, parameter in net.named_parameters():
        assert_close(parameter.grad, (separate[0][name] + separate[1][name]) / 2, name=name)


def test_balance_of_micro_batches_is_scaled_as_documented():
    """The term does not grow with the tokens, the layers or the micro-batches: it is a mean."""
    torch.manual_seed(0)
    layer, x = make_layer(), data(8)
    values = []
    for tokens in (x, x.repeat(4, 1), x.view(2, 4, D)):
        with routing_scope(layer) as scope:
            layer(tokens)
        values.append(scope.losses["balance"][0])
    assert_close(values[1], values[0])
    assert_close(values[2], values[0])


def test_evaluation_inside_a_scope_leaves_training_alone():
    net, x = Net(False), data()
    with routing_scope(net) as scope:
        loss = net(x).square().mean() + scope.losses["balance"].mean()
        with torch.no_grad():
            net(x)
        loss.backward()
    assert len(scope.infos) == 6
