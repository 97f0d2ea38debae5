"""Table 6: what choosing the degree and the all-to-all for each model gains over one choice for all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache

from flexpert.core.plan import ExecutionPlan

from .rows import Row, Table, full_capacity, layer_on, seconds_of_layer, testbed

Choice = tuple[str, int]
DEGREES = (1, 2, 4, 8)
CHOICES: list[Choice] = list(itertools.product(("linear", "2dh"), DEGREES))
# GPUs: gain in % over linear of degree 1, 2, 4, 8, then 2DH of degree 1, 2, 4, 8
AVERAGE = {
    16: (20, 2, 2, 11, 101, 98, 100, 106),
    32: (16, 1, 2, 11, 45, 43, 44, 51),
    64: (13, 1, 5, 15, 28, 25, 27, 34),
    128: (9, 2, 9, 29, 16, 16, 19, 26),
    256: (20, 27, 54, 107, 12, 20, 34, 11),
}
WORST = {
    16: (60, 32, 50, 176, 149, 139, 142, 184),
    32: (60, 31, 41, 135, 89, 75, 59, 148),
    64: (55, 23, 42, 161, 70, 54, 41, 109),
    128: (45, 54, 87, 300, 52, 37, 35, 107),
    256: (100, 160, 317, 599, 73, 139, 193, 182),
}
GRID = tuple(itertools.product((0.5, 1, 2), (1024, 2048, 4096), (1024, 2048, 4096), (4096, 16_384, 65_536)))


def average_gain() -> Table:
    """Table 6a: the mean over the models."""
    return _table("mean gain of the best choice over each static one", AVERAGE, worst=False)


def worst_gain() -> Table:
    """Table 6b: the model for which the static choice is worst."""
    return _table("largest gain of the best choice over each static one", WORST, worst=True)


@cache
def gains(ranks: int) -> dict[Choice, tuple[float, float]]:
    """Mean and largest gain in % of the best choice over each static one, over the models of the grid."""
    cluster = testbed(ranks)
    found: dict[Choice, list[float]] = {choice: [] for choice in CHOICES}
    for each, model_dim, hidden_dim, tokens in GRID:
        shape = layer_on(ranks, model_dim=model_dim, hidden_dim=hidden_dim, num_experts=int(each * ranks))
        workload = full_capacity(shape, tokens, top_k=2)
        times = {
            (algorithm, degree): seconds_of_layer(
                cluster, shape, workload,
                ExecutionPlan(r=1, degree=degree, algorithm=algorithm, capacity="padded"),
            )
            for algorithm, degree in CHOICES
        }  # fmt: skip
        best = min(times.values())
        for choice, seconds in times.items():
            found[choice].append(100 * (seconds / best - 1))
    return {choice: (sum(values) / len(values), max(values)) for choice, values in found.items()}


def kendall(left: list[float], right: list[float]) -> float:
    """Kendall's tau: 1 where both order all pairs alike, -1 where none."""
    pairs = list(itertools.combinations(range(len(left)), 2))
    signs = [_sign(left[i] - left[j]) * _sign(right[i] - right[j]) for i, j in pairs]
    return sum(signs) / len(pairs)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _table(title: str, paper: Mapping[int, tuple[int, ...]], worst: bool) -> Table:
    rows, claims, notes = [], [], []
    for ranks, printed in paper.items():
        ours = [gains(ranks)[choice][worst] for choice in CHOICES]
        rows += [
            Row(name=f"{ranks} GPUs: over {algorithm}, degree {degree}", paper=there, ours=here, unit="%")
            for (algorithm, degree), there, here in zip(CHOICES, printed, ours, strict=True)
        ]
        best_there, best_here = CHOICES[printed.index(min(printed))], CHOICES[ours.index(min(ours))]
        claims += [
            (f"{ranks} GPUs: every static choice loses somewhere", min(ours) > 0),
            (
                f"{ranks} GPUs: the best static algorithm is {best_there[0]} (here {best_here[0]}, degree "
                f"{best_here[1]}; there {best_there[1]})",
                best_there[0] == best_here[0],
            ),
        ]
        notes.append(f"{ranks} GPUs: Kendall's tau of the eight choices {kendall(list(printed), ours):+.2f}.")
    notes.append(
        f"{len(GRID)} models of each scale, all products of the listed sets; the paper counts 243. Top-2, "
        f"capacity factor 1, r = 1, fp32."
    )
    return Table(title=title, rows=rows, claims=claims, notes=notes)
