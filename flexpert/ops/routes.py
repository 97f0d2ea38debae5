"""What `ops.route` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routes(NamedTuple):
    """The choices of T tokens among E experts, K each, and their N = T * K rows grouped by expert.

    The first `counts_E.sum()` rows are kept: those of expert 0, then those of expert 1, ..., each expert's in
    order of priority; the others follow in order of priority. `score_TE` and `weight_N` have gradients.

    Attributes:
        score_TE: gate scores.
        ids_TK: int64, each token's experts, best first.
        order_N: int64, the choice each row is: k * T + t for the k-th of token t.
        unit_N: int64, the token of each row.
        weight_N: the weight of each row, 0 for those not kept.
        counts_E: int64, rows each expert keeps.
        slot_N: int64, the place of each kept row among its expert's; empty without a limit.
    """

    score_TE: Tensor
    ids_TK: Tensor
    order_N: Tensor
    unit_N: Tensor
    weight_N: Tensor
    counts_E: Tensor
    slot_N: Tensor
