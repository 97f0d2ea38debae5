"""What the tuner knows, for people."""

from __future__ import annotations

import statistics
from typing import Any

from .bucket import Bucket
from .candidate import describe
from .dictionary import Dictionary
from .entry import Entry
from .search import Search
from .workload import LayerShape


def report(
    dictionary: Dictionary, settings: Any, steps: int, trials: int, layers: list[str]
) -> dict[str, Any]:
    """Figures of a run and the table of each bucket, as plain data."""
    return {
        "steps": steps,
        "trials": trials,
        "share": trials / steps if steps else 0.0,
        "bounds": {
            "share": settings.share,
            "burst": settings.burst,
            "trials per bucket": settings.limits.trials,
            "worst prediction": settings.limits.worst,
        },
        "layers": layers,
        "buckets": [
            bucket_report(shape, bucket, entry, dictionary.rows_per_bucket)
            for (shape, bucket), entry in sorted(dictionary.entries.items(), key=lambda item: item[0][1])
        ],
    }


def bucket_report(shape: LayerShape, bucket: Bucket, entry: Entry, rows_per_bucket: int) -> dict[str, Any]:
    """One bucket: its candidates by rank, the kernels of the best of them, and why the winner won."""
    search = entry.search
    measured = {sample.candidate for sample in search.samples}
    best = min(c.predicted for c in search.candidates)
    return {
        "layer": f"{shape.num_experts} experts {shape.model_dim} x {shape.hidden_dim}, {shape.expert_ranks} "
        f"expert ranks x {shape.slices} slices x {shape.replicas} replicas",
        "bucket": bucket.describe(rows_per_bucket),
        "winner": describe(entry.plan),
        "settled": entry.settled,
        "trials": entry.trials,
        "retuned": entry.retuned,
        "worst_tried": max((search.candidates[i].predicted for i in measured), default=best) / best,
        "why": entry.why(),
        "candidates": _candidates(search),
        "kernels": [] if entry.race is None else _candidates(entry.race),
    }


def _candidates(search: Search) -> list[dict[str, Any]]:
    """A row for each, best first: what was predicted, and what was measured beside the first choice."""
    standing, winner = search.standing, search.plan
    times: dict[int, list[float]] = {}
    for sample in search.samples:
        times.setdefault(sample.candidate, []).append(sample.seconds)
    rows = []
    for i, candidate in enumerate(search.candidates):
        scores = standing.scores.get(i, [])
        known = i == standing.leader or bool(scores)
        rows.append(
            {
                "plan": describe(candidate.plan),
                "predicted_ms": 1e3 * candidate.predicted,
                "step_ms": 1e3 * statistics.median(times[i]) if i in times else None,
                "measured": len(times.get(i, [])),
                "against_first": standing.score(i) if known else None,
                "half_width": search.half_width(len(scores)) if known else None,
                "winner": candidate.plan == winner,
            }
        )
    return sorted(
        rows, key=lambda row: (row["against_first"] is None, row["against_first"], row["predicted_ms"])
    )


def table(found: dict[str, Any], limit: int = 12) -> str:
    """The text of a bucket's report."""
    state = "settled" if found["settled"] else "still searching"
    again = f", tuned anew {found['retuned']} times" if found["retuned"] else ""
    lines = [
        f"{found['bucket']} ({found['layer']})",
        f"  {found['winner']}: {found['why']} [{state}, {found['trials']} trials, of "
        f"plans predicted up to {found['worst_tried']:.2f} times the best{again}]",
        f"  {'plan':<34}{'predicted ms':>13}{'step ms':>10}{'measured':>9}  against first choice",
        *map(_line, found["candidates"][:limit]),
    ]
    if rest := found["candidates"][limit:]:
        tried = sum(row["measured"] > 0 for row in rest)
        lines.append(f"  and {len(rest)} more, {tried or 'none'} of them tried")
    if found["kernels"]:
        lines += ["  the best of them with each kernel:", *map(_line, found["kernels"])]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    step = "-" if row["step_ms"] is None else f"{row['step_ms']:.1f}"
    against = (
        "" if row["against_first"] is None else f"{row['against_first']:+.3f} +- {row['half_width']:.3f}"
    )
    mark = "*" if row["winner"] else " "
    return f" {mark}{row['plan']:<34}{row['predicted_ms']:>13.2f}{step:>10}{row['measured']:>9}  {against}"
