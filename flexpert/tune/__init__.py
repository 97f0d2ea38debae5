"""Choosing execution plans: workloads, machines, the time and memory a plan takes, and the tuner."""

from .attach import attach, cost_of, dictionary_path, digest_of, place_of
from .bucket import Bucket
from .cost import Cost, candidates, predict
from .dictionary import Dictionary
from .limits import Limits
from .log import PlanLog
from .machine import Link, Machine, Overheads, Rate
from .settings import TunerSettings
from .tuner import Tuner
from .workload import LayerShape, Workload

__all__ = [
    "Bucket",
    "Cost",
    "Dictionary",
    "LayerShape",
    "Limits",
    "Link",
    "Machine",
    "Overheads",
    "PlanLog",
    "Rate",
    "Tuner",
    "TunerSettings",
    "Workload",
    "attach",
    "candidates",
    "cost_of",
    "dictionary_path",
    "digest_of",
    "place_of",
    "predict",
]
