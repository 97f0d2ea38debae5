"""Choosing execution plans: workloads, machines, and the time and memory that a plan takes."""

from .cost import Cost, candidates, predict
from .machine import Link, Machine, Overheads, Rate
from .workload import LayerShape, Workload

__all__ = ["Cost", "LayerShape", "Link", "Machine", "Overheads", "Rate", "Workload", "candidates", "predict"]
