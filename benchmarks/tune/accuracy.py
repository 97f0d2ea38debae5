"""How near predictions are to measurements: errors, rankings, and what can be asked of a ranking."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any


def kendall(measured: Sequence[float], predicted: Sequence[float], least: Sequence[float] = ()) -> float:
    """Tau-a: pairs in the same order less those in the other, over all pairs.

    Args:
        measured, predicted: of each plan.
        least: standard errors of `measured`; pairs within two of their difference are left out. None: all.
    """
    signs = []
    for i, j in itertools.combinations(range(len(measured)), 2):
        if least and abs(measured[i] - measured[j]) <= 2 * math.hypot(least[i], least[j]):
            continue
        signs.append((measured[i] - measured[j]) * (predicted[i] - predicted[j]))
    return sum((s > 0) - (s < 0) for s in signs) / max(len(signs), 1)


def standard_error(times: Sequence[float]) -> float:
    """Of their median, from their median deviation: outliers do not count."""
    middle = statistics.median(times)
    deviation = 1.4826 * statistics.median(abs(t - middle) for t in times)
    return 1.2533 * deviation / math.sqrt(len(times))


def repeatability(times: Sequence[Sequence[float]]) -> float:
    """Tau between medians of one half of the repeats and of the other, the mean over all halves."""
    number = len(times[0])
    found = []
    for half in itertools.combinations(range(number), number // 2):
        rest = [i for i in range(number) if i not in half]
        pair = [[statistics.median(t[i] for i in places) for t in times] for places in (half, rest)]
        found.append(kendall(*pair))
    return statistics.mean(found)


def summary(cluster: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each load of each layer."""
    lines = []
    for key in dict.fromkeys((row["layer"], row["load"]) for row in rows):
        part = [row for row in rows if (row["layer"], row["load"]) == key]
        errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in part]
        measured, predicted = ([row[name] for row in part] for name in ("measured_ms", "predicted_ms"))
        times = [row["times_ms"] for row in part]
        chosen = measured[predicted.index(min(predicted))]
        exact = all(row["bytes_measured"] == row["bytes_predicted"] for row in part)
        lines.append(
            [
                cluster,
                *key,
                str(len(part)),
                f"{min(measured):.0f} to {max(measured):.0f}",
                f"{statistics.median(errors):.0%}",
                f"{max(errors):.0%}",
                f"{kendall(measured, predicted):.2f}",
                f"{kendall(measured, predicted, [standard_error(t) for t in times]):.2f}",
                f"{repeatability(times):.2f}",
                f"{chosen / min(measured):.2f}",
                "exact" if exact else "WRONG",
            ]
        )
    return lines


def text_of(data: dict[str, Any]) -> str:
    """The page: what was run, the tables."""
    rows, memory = data["rows"], data["memory"]
    lines = [line for c in data["clusters"] for line in summary(c["cluster"], _of(c, rows))]
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    taus, apart, repeated = ([float(line[i]) for line in lines] for i in (7, 8, 9))
    off = [abs(row["predicted_mib"] / row["measured_mib"] - 1) for row in memory]
    exact = all(row["bytes_measured"] == row["bytes_predicted"] for row in rows)
    words = (
        f"{len(rows)} plans in {len(lines)} loads. Median error of a step's time: "
        f"{statistics.median(errors or [0]):.0%}. Kendall's "
        f"tau of the plans of a load, mean (least to most): {_mean(taus)}; of pairs that measurements tell "
        f"apart (by two standard errors): {_mean(apart)}; between one half of them and the other half, "
        f"what can be asked for: {_mean(repeated)}. Bytes {'exact' if exact else 'WRONG'}, memory off "
        f"by {max(off, default=0):.1%} at most. Milliseconds are medians, forward and backward, the slowest "
        f"rank counts. Chosen / best: the measured time of the plan that is predicted to be best, over that "
        f"of the best."
    )
    header = ["cluster", "layer", "load", "plans", "measured ms", "median error", "largest", "tau",
              "tau, told apart", "tau, repeated", "chosen / best", "bytes"]  # fmt: skip
    sizes = [
        [
            row["plan"],
            str(row["tokens"]),
            f"{row['measured_mib']:.1f}",
            f"{row['predicted_mib']:.1f}",
            f"{row['predicted_mib'] / row['measured_mib'] - 1:+.1%}",
        ]
        for row in memory
    ]
    commands = dict.fromkeys(c["command"] for c in [*data["clusters"], *memory])
    parts = [", ".join(f"`{command}`" for command in commands), words, _table(header, lines)]
    parts += ["Memory of a rank at the peak of a step:"]
    parts += [_table(["plan", "tokens", "measured MiB", "predicted MiB", "error"], sizes)]
    return "\n\n".join(parts) + "\n"


def _of(cluster: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["cluster"] == cluster["cluster"]]


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines])
