"""Steps of models on clusters that are not at hand: time, memory, bottleneck, and the best plan."""

from .cluster import Cluster, Unlike
from .job import JobPlan
from .model import Block, ExpertPart, Model
from .recommend import Recommendation, recommend
from .step import Step, simulate
from .traffic import Recorded, Synthetic, Traffic, parse_traffic

__all__ = [
    "Block",
    "Cluster",
    "ExpertPart",
    "JobPlan",
    "Model",
    "Recommendation",
    "Recorded",
    "Step",
    "Synthetic",
    "Traffic",
    "Unlike",
    "parse_traffic",
    "recommend",
    "simulate",
]
