"""Choosing execution plans: workloads, machines, and the time and memory that a plan takes."""

from .cost import Cost, candidates, predict
from .machine import Link, Machine, Rate
from .workload import LayerShape, Workload

__all__ = ["Cost", "LayerShape", "Link", "Machine", "Rate", "Workload", "candidates", "predict"]
