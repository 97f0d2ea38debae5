from __future__ import annotations

import pytest

from flexpert.bench import make_plan, plan
from flexpert.core.errors import ConfigError


def places(made):
    return [(cell.config, cell.dtype, cell.shape.tokens) for cell in made.cells]


def test_everything_by_default():
    made = make_plan()
    decode = [("D", "bf16", tokens) for tokens in (1, 8, 64)]
    training = [("A", 4096), ("B", 4096), ("C", 3136)]
    assert places(made) == [(n, d, t) for n, t in training for d in ("fp32", "bf16")] + decode
    assert [item.name for item in made.implementations] == list(plan.IMPLEMENTATIONS)
    assert made.memory
    assert made.cells[-1].shape.hidden_dim == 512


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_quick_has_every_configuration_once(monkeypatch, fast, dtype):
    monkeypatch.setattr(plan, "has_fast_bf16", lambda: fast)
    made = make_plan(quick=True)
    assert [(c, d) for c, d, _ in places(made)] == [*((c, dtype) for c in "ABC"), *[("D", "bf16")] * 3]
    assert made.seconds < 5
    assert len(made.implementations) < len(plan.IMPLEMENTATIONS)
    assert make_plan(quick=True, seconds=9.0, dtypes=["fp32"]).seconds == 9


def test_what_is_asked_for_with_its_references():
    made = make_plan(configs=["C"], dtypes=["bf16"], implementations=["einsum"])
    assert places(made) == [("C", "bf16", 3136)]
    assert [item.name for item in made.implementations] == ["dense", "stream", "einsum"]
    assert {config for config, _, _ in places(make_plan(dtypes=["fp32"]))} == {"A", "B", "C"}


def test_a_configuration_of_ones_own():
    (fp32, bf16) = make_plan(custom={"model_dim": 48, "tokens": None}).cells
    assert (fp32.config, fp32.dtype, bf16.dtype) == ("custom", "fp32", "bf16")
    assert (fp32.shape.hidden_dim, fp32.shape.num_experts, fp32.shape.top_k) == (48, 8, 2)
    assert fp32.modes == ("forward", "forward+backward")
    (cell,) = make_plan(custom={"tokens": 64, "experts": 1, "expert": "glu", "dtype": "bf16"}).cells
    assert cell.modes == ("forward", "forward+backward", "decode")
    assert (cell.shape.top_k, cell.shape.gated, cell.shape.activation) == (1, True, "silu")
    assert cell.shape.capacity_factor is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seconds": 0.0}, "--seconds 0.0: expected a number > 0"),
        ({"seconds": float("nan")}, "--seconds nan"),
        ({"threads": 0}, "--threads 0: expected an integer from 1 to 1024"),
        ({"threads": 10**6}, "--threads 1000000: expected an integer from 1 to 1024"),
        ({"configs": ["A", "E"]}, "--configs 'E' is unknown; choose of: A, B, C, D"),
        ({"dtypes": ["fp64"]}, "--dtypes 'fp64' is unknown; choose of: fp32, bf16"),
        ({"implementations": ["ours"]}, "--implementations 'ours' is unknown; choose of: flexpert, "),
        ({"configs": ["D"], "dtypes": ["fp32"]}, "--dtypes fp32: configuration D is measured in bf16"),
        ({"configs": ["A"], "custom": {"top_k": 1}}, "--configs A: --top-k makes a configuration of its own"),
        ({"dtypes": ["fp32"], "custom": {"dtype": "fp32"}}, "--dtype fp32: --dtypes says it as well"),
        ({"custom": {"tokens": 0}}, "--tokens 0: expected an integer >= 1"),
        ({"custom": {"model_dim": -1}}, "--model-dim -1: expected an integer >= 1"),
        ({"custom": {"top_k": 9}}, "--top-k 9: expected at most the number of experts, 8; see --experts"),
        ({"custom": {"capacity_factor": 0.0}}, "--capacity-factor 0.0: expected a number > 0"),
        ({"custom": {"activation": "swish"}}, "--activation 'swish' is unknown; choose of: gelu"),
        ({"custom": {"expert": "moe"}}, "--expert 'moe' is unknown; choose of: mlp, glu"),
        (
            {"custom": {"tokens": 10**6, "experts": 10**7, "model_dim": 1, "hidden_dim": 1}},
            "--experts 10000000 .*GiB, this machine has .*choose a smaller one",
        ),
        (
            {"custom": {"experts": 10**9}},
            "--experts 1000000000 .*GiB, this machine has .*choose a smaller one",
        ),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(**flags)
