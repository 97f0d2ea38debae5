"""What a layer's router did over many calls, counted exactly: load, drops, entropy, pairs of experts.

Letters: T tokens, E experts, K choices of a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexpert.core.errors import InputError
from flexpert.core.routing import AnyRouting, DenseRouting
from flexpert.core.stats import RoutingStats


class RoutingRecord:
    """Counts of one layer; `add` each call, then `report`.

    Args:
        layer: its name.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._tokens = self._served = self._capacity = 0
        self._entropy = 0.0
        self._load_E = self._selected_E = self._pairs_EE = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def add(self, routing: AnyRouting, stats: RoutingStats) -> None:
        """Count a call.

        Raises:
            InputError: soft routing, in which no token chooses an expert.
        """
        if isinstance(routing, DenseRouting):
            raise InputError(f"{self.layer} routes softly: every expert reads all tokens, so none is chosen")
        chosen_TE, selected_E = _choices(routing)
        rows = int(routing.counts_E.sum())
        tokens = int(stats.tokens)
        self._tokens += tokens
        self._served += len(routing.unit_N[:rows].unique())
        self._capacity += int(stats.capacity)
        self._entropy += float(stats.entropy) * tokens
        self._load_E = self._load_E + routing.counts_E.cpu()
        self._selected_E = self._selected_E + selected_E.cpu()
        pairs_EE = chosen_TE.double().T @ chosen_TE.double()  # whole numbers, exact up to 2^53
        self._pairs_EE = self._pairs_EE + pairs_EE.round().long().cpu()

    def report(self) -> dict[str, Any]:
        """The counts and what follows from them, as plain numbers.

        Returns:
            "layer"; "experts" E; "tokens"; "load": rows each expert computed; "selected": tokens that chose
            it; "dropped": the difference, each of length E; "drop_rate"; "unserved": tokens that no expert
            computed; "capacity": rows that all experts could take, 0 without a limit; "entropy": mean entropy
            of a token's gate scores in nats; "load_entropy": of the load, as a share of log E: 1 is even;
            "max_violation": busiest expert over the mean choice, minus 1; "idle": experts without a row;
            "coactivation": (E, E) tokens that chose both experts, on the diagonal the one.
        """
        load, selected = self._load_E.tolist(), self._selected_E.tolist()
        mean = sum(selected) / len(selected)
        total = sum(load)
        entropy = -sum(n / total * math.log(n / total) for n in load if n)
        return {
            "layer": self.layer,
            "experts": len(load),
            "tokens": self._tokens,
            "load": load,
            "selected": selected,
            "dropped": [chosen - kept for chosen, kept in zip(selected, load, strict=True)],
            "drop_rate": (sum(selected) - total) / max(sum(selected), 1),
            "unserved": self._tokens - self._served,
            "capacity": self._capacity,
            "entropy": self._entropy / max(self._tokens, 1),
            "load_entropy": entropy / math.log(len(load)) if len(load) > 1 else 1.0,
            "max_violation": max(selected) / mean - 1 if mean else 0.0,
            "idle": load.count(0),
            "coactivation": self._pairs_EE.tolist(),
        }


def strongest_pairs(report: dict[str, Any], count: int = 3) -> list[tuple[int, int, int, float]]:
    """The pairs of experts that most tokens chose together.

    Args:
        report: of `RoutingRecord.report`.
        count: pairs, at most.

    Returns:
        (expert, expert, tokens, lift); lift is the number of tokens over that of independent choices.
    """
    pairs, tokens = report["coactivation"], report["tokens"]
    found = [
        (a, b, both, both * tokens / (row[a] * pairs[b][b]))
        for a, row in enumerate(pairs)
        for b, both in enumerate(row)
        if a < b and both
    ]
    return sorted(found, key=lambda pair: (-pair[2], pair[:2]))[:count]


def _choices(routing: Any) -> tuple[Tensor, Tensor]:
    """(chosen_TE bool, selected_E int64): the choices before drops; the rows where a router has none."""
    tokens, experts = routing.num_units, routing.num_experts
    if "ids_TK" in routing.aux:
        ids_TK = routing.aux["ids_TK"]
    else:
        rows = int(routing.counts_E.sum())
        expert_N = routing.expert_N()[:rows]
        chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device=expert_N.device)
        chosen_TE[routing.unit_N[:rows], expert_N] = True
        return chosen_TE, routing.counts_E
    chosen_TE = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=ids_TK.device)
    chosen_TE.scatter_(1, ids_TK, True)
    counts = torch.bincount(ids_TK.reshape(-1), minlength=experts + 1)
    return chosen_TE[:, :experts], counts[:experts]
