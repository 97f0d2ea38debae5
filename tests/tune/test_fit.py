"""Constants come back from times that the model made with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexpert.core.plan import ExecutionPlan
from flexpert.tune import Rate, Workload, predict
from flexpert.tune.cost import Predictor, candidates
from flexpert.tune.fit import FLOORS, Observation, fitted, values_of, with_values
from flexpert.tune.least_squares import nonnegative
from tests.tune.cases import machine_of, shape_of


def shared(**values):
    """Ranks that share two processors, with constants like those of emulated clusters."""
    usual = {
        "overheads.call": 3e-3,
        "overheads.call_backward": 2e-3,
        "overheads.chunk": 5e-4,
        "overheads.chunk_backward": 3e-4,
        "overheads.row": 1e-9,
        "overheads.row_backward": 2e-9,
        "overheads.cut": 1e-9,
        "overheads.cut_backward": 1e-9,
        "overheads.collective": 2e-4,
        "overheads.relay": 1e-4,
        "inside.per_message": 1e-4,
        "between.per_message": 1e-4,
        "exposed": 0.5,
    }
    return with_values(machine_of(processors=2, sharing=4), usual | values)


def observe(machine, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens, width, hidden in ((8, 8, 8), (512, 128, 16), (512, 128, 512)):
        shape = shape_of(model_dim=width, output_dim=width, hidden_dim=hidden)
        workload = Workload.zipf(shape, tokens, skew=0.2)
        for degree in (1, 4):
            for algorithm in ("linear", "2dh"):
                plan = ExecutionPlan(degree=degree, algorithm=algorithm)
                forward, total = (
                    predict(shape, plan, workload, machine, backward=backward).seconds
                    * (1 + noise * float(torch.randn((), generator=generator)))
                    for backward in (False, True)
                )
                found.append(Observation(shape, workload, plan, forward, total))
    return found


def worst(machine, truth):
    """The largest relative error of a step's time over the plans of a layer that was not observed."""
    shape = shape_of(model_dim=64, output_dim=64, hidden_dim=256, slices=2, num_experts=8)
    workload = Workload.zipf(shape, 300, skew=0.7)
    found, right = Predictor(machine), Predictor(truth)
    return max(
        abs(found(shape, p, workload) / right(shape, p, workload) - 1) for p in candidates(shape) if p.r
    )


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.08), (0.05, 0.2)])
def test_the_truth_is_found_from_wrong_beginnings(noise, allowed):
    truth = shared()
    wrong = shared(
        **{
            "overheads.call": 6e-3,
            "overheads.chunk": 1e-3,
            "overheads.collective": 5e-5,
            "between.per_message": 4e-4,
            "overheads.row_backward": 0.0,
            "exposed": 0.1,
        }
    )
    assert worst(wrong, truth) > 0.3
    machine = fitted(wrong, observe(truth, noise))
    assert worst(machine, truth) < allowed


def test_a_call_keeps_part_of_what_it_takes_by_itself():
    truth = shared(**{"overheads.call": 0.0, "overheads.call_backward": 0.0})
    found = values_of(fitted(shared(), observe(truth)))
    assert found["overheads.call"] >= FLOORS["overheads.call"] * 3e-3 - 1e-12
    assert found["overheads.call_backward"] >= FLOORS["overheads.call_backward"] * 2e-3 - 1e-12
    assert all(value >= 0 for value in found.values())
    assert found["exposed"] <= 1


def test_products_that_the_layers_hardly_show_keep_a_time():
    times = observe(shared())
    swift = [dataclasses.replace(o, forward=o.forward / 3, total=o.total / 3) for o in times]
    machine = fitted(shared(), swift)
    assert (
        machine.rate("float32").forward[0]
        <= shared().rate("float32").forward[0] / FLOORS["products"] * 1.0001
    )


def test_rates_of_many_rows_are_those_of_each():
    for rate in (
        Rate(rows=(2, 64, 512), forward=(1e8, 2e9, 4e9), backward=(2e8, 1e9, 3e9)),
        Rate(rows=(4,), forward=(1e9,), backward=(5e8,)),
    ):
        rows = torch.tensor([[0.0, 0.5, 1.0, 2.0], [3.0, 64.0, 100.5, 512.0], [513.0, 4.0, 4.5, 9000.0]])
        for backward in (False, True):
            found = rate.seconds_of(rows.double(), 7.0, backward=backward)
            wanted = [[rate.seconds(n, 7.0, backward=backward) for n in row] for row in rows.tolist()]
            assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12)
        slower = rate.slower(2.0).seconds_of(rows.double(), 7.0)
        assert torch.allclose(slower, 2 * rate.seconds_of(rows.double(), 7.0))


def test_a_predictor_says_what_predict_says():
    machine = shared()
    predictor = Predictor(machine)
    for slices, skew in ((1, 0.0), (4, 1.0)):
        shape = shape_of(slices=slices, gated=True, bias="both", output_dim=12)
        for seed in range(2):
            workload = Workload.zipf(shape, 100, skew=skew, seed=seed, capacity=60)
            for plan in candidates(shape):
                alone = predict(shape, dataclasses.replace(plan), workload, machine).seconds
                assert predictor(shape, plan, workload) == pytest.approx(alone, rel=1e-12)


def test_nothing_is_known_of_what_no_equation_has():
    assert nonnegative([[1.0, 0.0], [2.0, 0.0]], [1.0, 2.0]) == pytest.approx([1.0, 0.0])
    assert nonnegative([[1.0]], [-3.0]) == [0.0]
