"""What tuning costs and brings, under a workload that varies as in training.

    python -m benchmarks.tune.regret

The workload goes through its phases several times: tokens rise, top-k is switched, the capacity factor moves
from 1 to 8. In each phase blocks of steps of the tuned run take turns with rounds of all static plans on the
same kind of tokens; `hindsight` makes of them the best plan of each phase and the static plans' totals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.bench.machine import machine_facts
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.tune import Tuner, TunerSettings, attach, cost_of
from flexpert.tune.calibrate import calibrate
from flexpert.tune.candidate import describe

from .hindsight import Hindsight

RESULTS = Path(__file__).parent / "results"
D, F, EXPERTS = 256, 256, 4
CLUSTER = {"nodes": 4, "ranks": 2, "bandwidth": "200mbit", "latency": "500us"}


@dataclass(frozen=True)
class Phase:
    """What the tokens of some steps are like."""

    tokens: int
    top_k: int
    capacity_factor: float


# The rows of a rank swing by 4.4 times, before drops: with few of them it is tokens that should travel, with
# many it is parameters.
PHASES = (
    Phase(288, 1, 1.0),
    Phase(288, 2, 2.0),
    Phase(384, 1, 8.0),
    Phase(448, 2, 4.0),
    Phase(512, 1, 8.0),
    Phase(576, 2, 2.0),
    Phase(640, 1, 4.0),
    Phase(640, 2, 4.0),
)

# The static plans: every r, and of the others what is worth a thought.
STATIC = (
    ExecutionPlan(r=0),
    ExecutionPlan(r=1),
    ExecutionPlan(r=1, degree=2),
    ExecutionPlan(r=1, algorithm="2dh"),
    ExecutionPlan(r=1, degree=2, algorithm="2dh"),
    ExecutionPlan(r=1, capacity="padded"),
    ExecutionPlan(r=2),
    ExecutionPlan(r=2, degree=2),
)


class Steps:
    """Steps of one layer on this rank."""

    def __init__(self) -> None:
        self.mesh = expert_mesh(EXPERTS)
        torch.manual_seed(0)
        options: dict[str, Any] = {"router": "hash", "top_k": 2, "capacity_factor": 1.0}
        self.layer = MoE(MoEConfig(model_dim=D, hidden_dim=F, num_experts=EXPERTS, **options))
        parallelize(self.layer, self.mesh)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-6)
        self._ids = torch.arange(1, 257).double().pow(-0.7)  # as words: some are frequent

    def run(self, phase: Phase, plan: ExecutionPlan | None, seed: int) -> None:
        """Forward, backward and optimiser on tokens that follow from the seed."""
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        ids = torch.multinomial(self._ids, phase.tokens, replacement=True, generator=generator)
        x = torch.randn(phase.tokens, D, generator=generator).requires_grad_()
        y = self.layer(
            x,
            context=RoutingContext(token_ids=ids),
            top_k=phase.top_k,
            capacity_factor=phase.capacity_factor,
            plan=plan,
        )
        y.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def on_rank(passes: int, steps: int, repeats: int) -> dict[str, Any]:
    """The whole measurement; seconds are means over the ranks, which end a step together."""
    began = time.perf_counter()
    machine = calibrate(model_dim=D, hidden_dim=F)
    calibrated = time.perf_counter() - began
    run = Steps()
    tuner = Tuner(cost_of(machine), TunerSettings())
    attach(run.layer, tuner)
    seeds = itertools.count(1)
    blocks: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    for turn, (number, phase), half in itertools.product(range(passes), enumerate(PHASES), (0, 1)):
        place = {"turn": turn, "phase": number, "half": half}
        blocks.append(place | tuned_block(run, tuner, phase, steps // 2, seeds))
        seconds = {describe(plan): static_steps(run, phase, plan, repeats // 2, seeds) for plan in STATIC}
        rounds.append(place | {"seconds": seconds})
        if dist.get_rank() == 0 and half:
            print(turn, phase, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return {
        "calibration_seconds": calibrated,
        "machine": machine.to_dict(),
        "blocks": blocks,
        "rounds": rounds,
        "report": tuner.report(),
        "seconds": time.perf_counter() - began,
    }


def tuned_block(
    run: Steps, tuner: Tuner, phase: Phase, steps: int, seeds: Iterator[int]
) -> dict[str, list[Any]]:
    """Steps that the tuner chooses for: seconds, plans, and which were trials.

    As with static plans, a first step that switches back from other plans is not counted.
    """
    run.run(phase, next(iter(tuner.plans.values())), next(seeds))
    dist.barrier()
    times, plans, trials = [], [], []
    for _ in range(steps):
        tried, seed = tuner.trials, next(seeds)
        begin = time.perf_counter()
        with tuner.step():
            run.run(phase, None, seed)
        times.append(time.perf_counter() - begin)
        plans.append(tuner.describe_plans())
        trials.append(tuner.trials - tried)
    return {"seconds": _mean_over_ranks(times), "plans": plans, "trials": trials}


def static_steps(
    run: Steps, phase: Phase, plan: ExecutionPlan, repeats: int, seeds: Iterator[int]
) -> list[float]:
    """Seconds of steps with one plan, without the first."""
    dist.barrier()
    times = []
    for _ in range(repeats + 1):
        seed = next(seeds)
        begin = time.perf_counter()
        run.run(phase, plan, seed)
        times.append(time.perf_counter() - begin)
    return _mean_over_ranks(times)[1:]


def _mean_over_ranks(times: list[float]) -> list[float]:
    total = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def evaluate(found: dict[str, Any], passes: int) -> dict[str, Any]:
    """The tuned run against hindsight and static plans: of all passes, and without the first one."""
    hindsight = Hindsight(found)
    whole = hindsight.over(range(passes))
    warm = hindsight.over(range(1, passes))
    return {
        "all": whole,
        "after_warm_up": warm,
        "passes": [hindsight.over([turn]) for turn in range(passes)],
        "phases": [
            {
                "times": hindsight.times(phase, range(passes)),
                "best": hindsight.best(phase, range(passes)),
                "last_plan": statistics.mode(s.plan for s in hindsight.steps(phase, [passes - 1])),
            }
            for phase in hindsight.phases
        ],
    }


def text_of(result: dict[str, Any], found: dict[str, Any], mode: str) -> str:
    """The tables, as Markdown."""
    command = shlex.join(["python", "-m", "benchmarks.tune.regret", *sys.argv[1:]])
    report, whole, warm = found["report"], result["all"], result["after_warm_up"]
    static = list(warm["static"].items())
    trials = [sum(sum(b["trials"]) for b in found["blocks"] if b["turn"] == t) for t in
              range(len(result["passes"]))]  # fmt: skip
    compared = sum(len(times) for r in found["rounds"] for times in r["seconds"].values())
    lines = [
        f"`{command}`",
        "",
        f"One layer, {EXPERTS} experts of {D} x {F}, forward, backward and optimiser, on {CLUSTER['nodes']} "
        f"nodes of {CLUSTER['ranks']} ranks, {CLUSTER['bandwidth']}, {CLUSTER['latency']} ({mode}); all "
        f"ranks share two cores. {len(result['passes'])} passes through {len(PHASES)} phases, "
        f"{whole['steps']} steps of the tuned run, {compared} "
        f"of static plans in turns with them. The best plan of a phase is chosen by other steps than those "
        f"that tell its time; a step of more than twice its plan's median counts as twice it. Calibration "
        f"took {found['calibration_seconds']:.1f} s, once, and is not counted.",
        "",
        "| | ms a step | over hindsight | of it the tuner's own time | trials |",
        "|---|---|---|---|---|",
    ]
    for name, figures, number in (
        *((f"pass {i}", figures, trials[i - 1]) for i, figures in enumerate(result["passes"], 1)),
        ("after the first pass", warm, sum(trials[1:])),
        ("all, warm-up counted", whole, sum(trials)),
    ):
        lines.append(
            f"| tuned, {name} | {1e3 * figures['tuned'] / figures['steps']:.1f} "
            f"| {figures['regret']:+.1%} | {figures['of_the_tuner_itself']:+.1%} | {number} |"
        )
    ideal = ("best plan of each phase, in hindsight", warm["hindsight"])
    for name, seconds in (ideal, *((f"static: {plan}", seconds) for plan, seconds in static)):
        lines.append(
            f"| {name} | {1e3 * seconds / warm['steps']:.1f} | {seconds / warm['hindsight'] - 1:+.1%} | | |"
        )
    lines += [
        "",
        "Hindsight and static plans: of the passes after the first.",
        "",
        f"Trials: {report['trials']} of {report['steps']} steps ({report['share']:.0%}), in "
        f"{len(report['buckets'])} buckets; the worst plan tried was predicted to take "
        f"{max(b['worst_tried'] for b in report['buckets']):.2f} times the best.",
        "",
        "| phase: tokens, top-k, capacity factor | best | ms | tuned run's plan in the last pass | its ms "
        "| worst ms |",
        "|---|---|---|---|---|---|",
    ]
    for phase, found_ in zip(PHASES, result["phases"], strict=True):
        times, last = found_["times"], found_["last_plan"]
        best = min(times, key=lambda plan: times[plan])
        own = f"{1e3 * times[last]:.0f}" if last in times else ""
        lines.append(
            f"| {phase.tokens}, {phase.top_k}, {phase.capacity_factor:g} | {best} | {1e3 * times[best]:.0f} "
            f"| {last} | {own} | {1e3 * max(times.values()):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of the tuned run in each phase of a pass")
    parser.add_argument("--repeats", type=int, default=4, help="of each static plan in each phase of a pass")
    parser.add_argument("--name", default="regret")
    options = parser.parse_args()
    facts = machine_facts()  # builds the native library before ranks compete for the processors
    with Cluster(**CLUSTER) as cluster:
        limits = {"timeout": 3600.0, "collective_timeout": 600.0}
        found = cluster.run(on_rank, options.passes, options.steps, options.repeats, **limits)[0]
        mode = cluster.mode
    result = evaluate(found, options.passes)
    text = text_of(result, found, mode)
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": facts, "phases": [vars(p) for p in PHASES], **result, "measured": found}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{options.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
