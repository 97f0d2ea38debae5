"""Which parameters of SwinV2-MoE are decayed: weight matrices, and nothing that plays another part."""

from __future__ import annotations

from typing import Any

from torch import nn

# Parts of names. Published: cpb_mlp, the position tables, fc1_bias, fc2_bias, temperature, cosine_projector and
# sim_matrix (these four belong to the router), and logit_scale of SwinV2 itself.
_POSITION = ("continuous_position_bias_mlp.", "position_embeddings", "logit_scale")
_EXPERT_BIASES = (".experts.b1", ".experts.b2")
_COSINE_ROUTER = (".router.projector.", ".router.log_scale")
