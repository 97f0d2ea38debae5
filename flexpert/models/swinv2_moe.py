"""SwinV2-MoE for image classification, on the Swin Transformer V2 of `transformers`.

See `SwinV2MoEConfig` for the paper, and `SwinV2MoEModel` for what differs from the published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers import initialization as init
from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2ForImageClassification,
    Swinv2ImageClassifierOutput,
    Swinv2Model,
)

from flexpert.core.config import MoEConfig
from flexpert.experts import MLPExperts
from flexpert.layer import MoE
from flexpert.routers import CosineRouter, LinearRouter

from . import experts as _experts  # registers "mlp_dropout"
from .model_card import model_card
from .swinv2_moe_config import SwinV2MoEConfig, preset
from .weight_decay import no_weight_decay, parameter_groups
