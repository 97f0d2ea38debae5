"""What tuning costs and brings, under a workload that varies as in training.

    python -m benchmarks.tune.regret

The workload goes through its phases several times: tokens rise, top-k is switched, the capacity factor moves
from 1 to 8. In each phase the tuned run takes its steps; then, in turns with it, all plans of the comparison
take theirs on the same tokens. From these come the best plan of each phase in hindsight and the static plans'
total times.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.bench.machine import machine_facts
from flexpert.emulate import Cluster
from flexpert.parallel import ExecutionPlan, expert_mesh, parallelize
from flexpert.tune import Machine, Tuner, TunerSettings, attach, cost_of
from flexpert.tune.calibrate import calibrate
from flexpert.tune.search import describe

RESULTS = Path(__file__).parent / "results"
D, F, EXPERTS = 256, 256, 4
CLUSTER = {"nodes": 4, "ranks": 2, "bandwidth": "200mbit", "latency": "500us"}


@dataclass(frozen=True)
class Phase:
    """What the tokens of some steps are like."""

    tokens: int
    top_k: int
    capacity_factor: float


# The rows of a rank swing by 4 times, before drops.
PHASES = (
    Phase(160, 1, 1.0),
    Phase(160, 2, 2.0),
    Phase(224, 1, 4.0),
    Phase(224, 2, 8.0),
    Phase(288, 1, 8.0),
    Phase(288, 2, 4.0),
    Phase(320, 1, 2.0),
    Phase(320, 2, 8.0),
)

# The static plans: every r, and of the others what is worth a thought.
STATIC = (
    ExecutionPlan(r=0),
    *(
        ExecutionPlan(r=r, degree=degree, algorithm=algorithm)
        for r in (1, 2)
        for degree, algorithm in ((1, "linear"), (2, "linear"), (1, "2dh"), (2, "2dh"))
    ),
    ExecutionPlan(r=1, capacity="padded"),
    ExecutionPlan(r=2, capacity="padded"),
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
    tuned: list[list[float]] = []
    ran: list[list[str]] = []
    static: list[dict[str, list[float]]] = [{describe(plan): [] for plan in STATIC} for _ in PHASES]
    seed = 0
    for _ in range(passes):
        for number, phase in enumerate(PHASES):
            times, plans = [], []
            dist.barrier()
            for _ in range(steps):
                seed += 1
                begin = time.perf_counter()
                with tuner.step():
                    run.run(phase, None, seed)
                times.append(time.perf_counter() - begin)
                plans.append(tuner.describe_plans())
            if dist.get_rank() == 0:
                print(f"{phase}: {sum(times):.2f} s", file=sys.stderr, flush=True)
            tuned.append(_mean_over_ranks(times))
            ran.append(plans)
            for plan in STATIC:
                dist.barrier()
                times = []
                for _ in range(repeats + 1):  # the first one after a switch warms up
                    seed += 1
                    begin = time.perf_counter()
                    run.run(phase, plan, seed)
                    times.append(time.perf_counter() - begin)
                static[number][describe(plan)] += _mean_over_ranks(times)[1:]
    return {
        "calibration_seconds": calibrated,
        "machine": machine.to_dict(),
        "tuned": tuned,
        "plans": ran,
        "static": static,
        "report": tuner.report(),
        "seconds": time.perf_counter() - began,
    }


def _mean_over_ranks(times: list[float]) -> list[float]:
    total = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def evaluate(found: dict[str, Any], passes: int, steps: int) -> dict[str, Any]:
    """Total times: tuned, best plan of each phase in hindsight, best and worst static plan."""
    medians = [{plan: statistics.median(t) for plan, t in phase.items()} for phase in found["static"]]
    for number, phase in enumerate(medians):  # a plan that only the tuner ran counts as well
        own: dict[str, list[float]] = {}
        for turn in range(passes):
            place = turn * len(PHASES) + number
            for plan, seconds in zip(found["plans"][place], found["tuned"][place], strict=True):
                own.setdefault(plan, []).append(seconds)
        for plan, times in own.items():
            if plan not in phase and len(times) >= 5:
                phase[plan] = statistics.median(times)
    best = [min(phase.values()) for phase in medians]
    names = [describe(plan) for plan in STATIC]
    totals = {plan: sum(phase[plan] for phase in medians) * steps for plan in names}
    by_pass = [
        sum(map(sum, found["tuned"][turn * len(PHASES) : (turn + 1) * len(PHASES)])) for turn in range(passes)
    ]
    ideal = sum(best) * steps
    fixed = sorted(totals, key=lambda plan: totals[plan])
    warm = sum(by_pass[1:]) / (passes - 1)
    return {
        "medians": medians,
        "hindsight": ideal,
        "passes": by_pass,
        "regret_by_pass": [total / ideal - 1 for total in by_pass],
        "regret_after_warm_up": warm / ideal - 1,
        "regret_of_all": sum(by_pass) / passes / ideal - 1,
        "static": totals,
        "best_static": fixed[0],
        "worst_static": fixed[-1],
        "over_best_static": totals[fixed[0]] / (sum(by_pass) / passes),
        "worst_over_tuned": totals[fixed[-1]] / (sum(by_pass) / passes),
    }


def text_of(result: dict[str, Any], found: dict[str, Any], steps: int, mode: str) -> str:
    """The tables, as Markdown."""
    command = shlex.join(["python", "-m", "benchmarks.tune.regret", *sys.argv[1:]])
    passes = len(result["passes"])
    report = found["report"]
    lines = [
        f"`{command}`",
        "",
        f"One layer, {EXPERTS} experts of {D} x {F}, forward, backward and optimiser, on {CLUSTER['nodes']} "
        f"nodes of {CLUSTER['ranks']} ranks, {CLUSTER['bandwidth']}, {CLUSTER['latency']} ({mode}). "
        f"{len(PHASES)} phases of {steps} steps, {passes} times; in turns with them the static plans on "
        f"the same kind of tokens. Seconds of one pass. All ranks share two cores. Calibration took "
        f"{found['calibration_seconds']:.1f} s, once, and is not counted.",
        "",
        "| | seconds | over hindsight |",
        "|---|---|---|",
        f"| best plan of each phase, in hindsight | {result['hindsight']:.2f} | |",
    ]
    for number, seconds in enumerate(result["passes"], 1):
        over = result["regret_by_pass"][number - 1]
        lines.append(f"| tuned, pass {number} | {seconds:.2f} | {100 * over:+.1f} % |")
    mean = sum(result["passes"]) / passes
    lines += [
        f"| tuned, after the first pass | {sum(result['passes'][1:]) / (passes - 1):.2f} "
        f"| {100 * result['regret_after_warm_up']:+.1f} % |",
        f"| tuned, all passes | {mean:.2f} | {100 * result['regret_of_all']:+.1f} % |",
    ]
    for plan, seconds in sorted(result["static"].items(), key=lambda item: item[1]):
        over = seconds / result["hindsight"] - 1
        lines.append(f"| static: {plan} | {seconds:.2f} | {100 * over:+.1f} % |")
    lines += [
        "",
        f"Trials: {report['trials']} of {report['steps']} steps ({100 * report['share']:.0f} %), in "
        f"{len(report['buckets'])} buckets; the worst plan tried was predicted to take "
        f"{max(b['worst_tried'] for b in report['buckets']):.2f} times the best.",
        "",
        "| phase: tokens, top-k, capacity factor | best | ms | tuned run's plan at the end | worst ms |",
        "|---|---|---|---|---|",
    ]
    for number, (phase, medians) in enumerate(zip(PHASES, result["medians"], strict=True)):
        best = min(medians, key=lambda plan: medians[plan])
        last = found["plans"][(passes - 1) * len(PHASES) + number]
        lines.append(
            f"| {phase.tokens}, {phase.top_k}, {phase.capacity_factor:g} | {best} "
            f"| {1e3 * medians[best]:.0f} | {statistics.mode(last)} | {1e3 * max(medians.values()):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="of the tuned run in each phase of a pass")
    parser.add_argument("--repeats", type=int, default=2, help="of each static plan in each phase of a pass")
    parser.add_argument("--name", default="regret")
    options = parser.parse_args()
    with Cluster(**CLUSTER) as cluster:
        found = cluster.run(on_rank, options.passes, options.steps, options.repeats, timeout=1800)[0]
        mode = cluster.mode
    Machine.from_dict(found["machine"])
    result = evaluate(found, options.passes, options.steps)
    text = text_of(result, found, options.steps, mode)
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": machine_facts(), "phases": [vars(p) for p in PHASES], **result, "measured": found}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{options.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
