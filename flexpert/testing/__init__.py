"""For tests: closeness by relative error, a layer in plain loops, functions run on several ranks."""

from .closeness import TOLERANCES, assert_close, relative_error
from .naive import NaiveResult, naive_moe
from .ranks import RankPool, run_ranks

__all__ = [
    "TOLERANCES",
    "NaiveResult",
    "RankPool",
    "assert_close",
    "naive_moe",
    "relative_error",
    "run_ranks",
]
