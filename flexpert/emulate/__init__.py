"""Clusters of network namespaces on one machine, with shaped links."""

from __future__ import annotations

from .cluster import Cluster
from .job import Job
from .outcome import Outcome, RanksFailed
from .spec import ClusterSpec

__all__ = ["Cluster", "ClusterSpec", "Job", "Outcome", "RanksFailed"]
