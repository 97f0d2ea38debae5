"""Searches on recorded times with noise put on them: what they cost, and how good their winners are.

    python -m benchmarks.tune.searches

Plans take the times that `predict` measured, other kernels a given factor of them; predictions are those of
the file. It needs no ranks and no quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexpert.core.plan import ExecutionPlan
from flexpert.tune import LayerShape, TunerSettings
from flexpert.tune.entry import Entry
from flexpert.tune.shortlist import shortlist

MEASURED = Path(__file__).parent / "results" / "predict.json"
STEPS, SEEDS = 100, 8
SHAPE = LayerShape(
    model_dim=8, hidden_dim=8, output_dim=8, num_experts=8, expert_ranks=4, slices=2, ranks_per_node=4
)
# Times of a step with other kernels, over that with the usual one.
KERNELS: dict[str, dict[str, float]] = {
    "one kernel": {},
    "three more, 5 to 10 % slower": {"portable": 1.10, "recompute": 1.07, "separate": 1.05},
    "three more, 30 to 50 % slower": {"portable": 1.5, "recompute": 1.3, "separate": 1.5},
    "one of them 15 % faster": {"portable": 0.85, "recompute": 1.07, "separate": 1.05},
}


def search(rows: list[dict[str, Any]], kernels: Mapping[str, float], noise: float, seed: int) -> list[float]:
    """Seconds of the first choice, of all steps and of the winner, over those of the best plan, less 1."""
    plans = [ExecutionPlan.from_dict(row["plan"]) for row in rows]
    usual = dict(zip(plans, (row["measured_ms"] for row in rows), strict=True))
    predicted = dict(zip(plans, (row["predicted_ms"] for row in rows), strict=True))
    factors = {"auto": 1.0, **kernels}
    settings, clock = TunerSettings(), random.Random(seed)

    def truth(plan: ExecutionPlan) -> float:
        return float(usual[dataclasses.replace(plan, kernel="auto")]) * factors[plan.kernel]

    found = shortlist(plans, predicted.__getitem__)
    entry = Entry.begin(SHAPE, found, settings.limits, kernels=list(kernels))
    first, total, trials = truth(entry.plan), 0.0, 0
    for step in range(STEPS):
        tried = entry.next() if trials + 1 <= settings.burst + settings.share * step else None
        trials += tried is not None
        seconds = truth(tried or entry.plan)
        entry.record(tried or entry.plan, seconds * math.exp(clock.gauss(0, noise)))
        total += seconds
    best = min(usual.values()) * min(factors.values())
    return [first / best - 1, total / STEPS / best - 1, truth(entry.plan) / best - 1, trials]


def main() -> None:
    """Search, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    loads: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in json.loads(parser.parse_args().measured.read_text(encoding="utf-8"))["rows"]:
        loads.setdefault((row["cluster"], row["layer"], row["load"]), []).append(row)
    print(f"{len(loads)} loads, {SEEDS} searches each, over the best plan: mean of {STEPS} steps\n")
    print("| kernels | noise | first choice | all steps | winner | trials |\n|" + "---|" * 6)
    for name, kernels in KERNELS.items():
        for noise in (0.06, 0.12):
            figures = [search(rows, kernels, noise, seed) for rows in loads.values() for seed in range(SEEDS)]
            first, total, winner, trials = map(statistics.mean, zip(*figures, strict=True))
            print(f"| {name} | {noise:.0%} | {first:+.1%} | {total:+.1%} | {winner:+.1%} | {trials:.1f} |")


if __name__ == "__main__":
    main()
