"""The balance loss inside the loss a model returns."""

from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError
from flexpert.integrations.transformers import RouterProbe, attach_balance
from flexpert.testing import assert_close
from tests.integrations.transformers.models import build, checkpoint, tokens


def test_adds_the_weighted_mean_and_its_gradient():
    model, ids = build("olmoe"), tokens()
    plain = model(ids, labels=ids).loss
    with RouterProbe(model) as probe:
        model(ids)
        (want,) = torch.autograd.grad(
            probe.loss("z", scope="micro_batch").mean(), model.model.layers[0].mlp.gate.weight
        )
    attached = attach_balance(model, weight=0.5, name="z")
    loss = model(ids, labels=ids).loss
    assert_close(loss, plain + 0.5 * attached.last, 1e-6)
    weight = model.model.layers[0].mlp.gate.weight
    (whole,) = torch.autograd.grad(loss, weight)
    attached.detach()
    (rest,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
    assert_close(whole - rest, 0.5 * want, 1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_weigh_as_one_batch(checkpointed):
    """Each is divided by the items of all, as the Trainer does it."""
    model, ids = build("mixtral").train(), tokens(4)
    if checkpointed:
        checkpoint(model)
    attached = attach_balance(model, weight=0.1, scope="sequence")
    weight = model.model.layers[1].mlp.gate.weight
    gradients = []
    for parts in (ids.chunk(1), ids.chunk(2)):
        model.zero_grad()
        for part in parts:
            model(input_ids=part, labels=part, num_items_in_batch=torch.tensor(ids.numel())).loss.backward()
        gradients.append(weight.grad.clone())
        stats = attached.take_stats()
        assert all(value.tokens == ids.numel() for value in stats.values())
    assert_close(gradients[1], gradients[0], 1e-5)
    assert attached.take_stats() == {}


def test_calls_without_a_loss_leave_nothing_behind():
    model, ids = build("mixtral"), tokens()
    attached = attach_balance(model)
    model(ids)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert attached.last is None
    assert attached.probe.calls == {}
    assert attached.take_stats() == {}


def test_two_balance_losses_are_refused():
    model = build("mixtral")
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits is True.*False"):
        attach_balance(model)
    model.config.output_router_logits = False
    with pytest.raises(ConfigError, match="weight=-1"):
        attach_balance(model, weight=-1)
    with pytest.raises(ConfigError, match="unknown|loss"):
        attach_balance(model, name="balanse")
