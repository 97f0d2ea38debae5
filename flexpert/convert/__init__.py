"""Dense models to MoE models and back: copies, slices and pieces of their MLPs as experts.

Letters: D model_dim, F hidden_dim, O output_dim, E experts, K top_k, G copies, T tokens.
"""

from __future__ import annotations

from .back import to_dense
from .calibration import neuron_importance
from .conversion import convert
from .layouts import choose_mlps, find_mlps
from .methods import METHODS, Clone, Granular, Importance, Method, Slice
from .report import ConversionReport, LayerReport, Sizes, measure_model
from .resize import extract, grow
from .storage import load, save

__all__ = [
    "METHODS",
    "Clone",
    "ConversionReport",
    "Granular",
    "Importance",
    "LayerReport",
    "Method",
    "Sizes",
    "Slice",
    "choose_mlps",
    "convert",
    "extract",
    "find_mlps",
    "grow",
    "load",
    "measure_model",
    "neuron_importance",
    "save",
    "to_dense",
]
