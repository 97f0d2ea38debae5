"""Models by name: one layer, SwinV2-MoE, language models, or a file.

layer:model_dim=2048,hidden_dim=2048,num_experts=32,top_k=2
swinv2-moe-base:num_experts=32
mixtral-8x7b:length=4096
my_model.yaml           kind: layer | swinv2-moe-small | language | blocks, and its settings
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexpert.core.config import require_bool, require_int
from flexpert.core.errors import ConfigError, FlexpertError
from flexpert.core.registry import check_options, keyword_names, suggest

from .describe import split_file, split_text
from .model import Block, ExpertPart, Model

if TYPE_CHECKING:
    from flexpert.models.swinv2_moe_config import SwinV2MoEConfig


def parse_model(text: str) -> Model:
    """The model of a text.

    Raises:
        ConfigError: an unknown name or setting, or a bad value; the message names it.
    """
    found = split_file(text, "model")
    if found is None:
        name, settings = split_text(text, "model")
        return _build(name, settings)
    data, settings = found
    data = {**data, **settings}
    name = data.pop("kind", None)
    if name is None:
        raise ConfigError(f"model {text!r}: kind is missing; {suggest('', _names())}")
    if name == "blocks":
        return Model.from_dict({"name": "model", **data})
    return _build(name, data)


def layer(
    *,
    model_dim: int = 1024,
    hidden_dim: int = 4096,
    num_experts: int = 8,
    top_k: int = 2,
    capacity_factor: float | None = 1.0,
    gated: bool = False,
    bias: bool | str = False,
    dtype: str = "float32",
) -> Model:
    """One MoE layer alone; a batch is counted in tokens."""
    part = ExpertPart(
        model_dim=model_dim,
        hidden_dim=hidden_dim,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        gated=gated,
        bias=bias,
    )
    router = model_dim * num_experts
    block = Block(
        name="layer", tokens=1, width=model_dim, params=router, flops=2 * router,
        activations=model_dim + 2 * num_experts, experts=part,
    )  # fmt: skip
    return Model(name="layer", blocks=(block,), sample="token", dtype=dtype)


def language(
    *,
    name: str = "language",
    layers: int = 32,
    model_dim: int = 4096,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_dim: int = 14336,
    vocabulary: int = 32000,
    length: int = 4096,
    tied: bool = False,
    gated: bool = True,
    num_experts: int = 8,
    top_k: int = 2,
    expert_dim: int | None = None,
    shared_dim: int = 0,
    every: int = 1,
    first: int = 0,
    capacity_factor: float | None = None,
    dtype: str = "bfloat16",
) -> Model:
    """A decoder of a language model; a batch is counted in sequences.

    Args:
        name: of it.
        layers, model_dim, vocabulary, length: of the network and its sequences.
        heads, kv_heads, head_dim: of attention; by default as many key-value heads as heads, and
            model_dim / heads.
        hidden_dim: of dense layers.
        tied: the output shares the embedding's matrix.
        gated: GLUs, with three matrices.
        num_experts, top_k, capacity_factor: of MoE layers; 0 experts: a dense model.
        expert_dim: hidden dimension of an expert; None for hidden_dim.
        shared_dim: hidden dimension of the shared expert of an MoE layer; 0: none.
        every, first: each `every`-th layer from `first` on has experts, counted from 0.
        dtype: that it computes in; parameters are kept in float32.
    """
    _require_ints(
        1, layers=layers, model_dim=model_dim, heads=heads, hidden_dim=hidden_dim, length=length, every=every
    )
    chosen = {"kv_heads": kv_heads, "head_dim": head_dim, "expert_dim": expert_dim}
    _require_ints(1, **{name: value for name, value in chosen.items() if value is not None})
    _require_ints(0, vocabulary=vocabulary, first=first, shared_dim=shared_dim, num_experts=num_experts)
    require_bool("model: tied", tied)
    require_bool("model: gated", gated)
    head_dim = model_dim // heads if head_dim is None else head_dim
    kv_heads = heads if kv_heads is None else kv_heads
    part = ExpertPart(
        model_dim=model_dim,
        hidden_dim=hidden_dim if expert_dim is None else expert_dim,
        num_experts=num_experts,
        top_k=top_k,
        capacity_factor=capacity_factor,
        gated=gated,
    ) if num_experts else None  # fmt: skip
    queries, keys = heads * head_dim, kv_heads * head_dim
    blocks = [Block(name="embedding", tokens=length, width=model_dim, params=vocabulary * model_dim)]
    for index in range(layers):
        sparse = part is not None and index >= first and (index - first) % every == every - 1
        inner, experts = (shared_dim, part) if sparse else (hidden_dim, None)
        blocks.append(
            _decoder_layer(
                f"layer {index}", length, model_dim, queries, keys, inner, 3 if gated else 2, experts
            )
        )
    output = vocabulary * model_dim
    blocks.append(
        Block(
            name="output", tokens=length, width=model_dim, params=0 if tied else output, flops=2 * output,
            activations=2 * vocabulary + model_dim,
        )
    )  # fmt: skip
    return Model(name=name, blocks=tuple(blocks), sample="sequence", dtype=dtype)


def _require_ints(least: int, **values: Any) -> None:
    for name, value in values.items():
        require_int(f"model: {name}", value, least=least)


def _decoder_layer(
    name: str,
    length: int,
    model_dim: int,
    queries: int,
    keys: int,
    inner: int,
    matrices: int,
    experts: ExpertPart | None,
) -> Block:
    """A layer of a decoder: widths of queries and keys, hidden dimension and matrices of its dense part."""
    attention = model_dim * (2 * queries + 2 * keys)
    dense, num_experts = matrices * model_dim * inner, experts.num_experts if experts else 0
    params = attention + dense + model_dim * num_experts
    scores = 4 * queries * length / 2  # causal: half of length x length
    kept = 3 * model_dim + 2 * queries + 2 * keys
    return Block(
        name=name,
        tokens=length,
        width=model_dim,
        params=params + 2 * model_dim,
        flops=2 * params + scores,
        activations=kept + (matrices - 1) * inner + 2 * num_experts,
        experts=experts,
    )


def swinv2_moe(size: str = "base", *, dtype: str = "float16", **settings: Any) -> Model:
    """SwinV2-MoE of a size of `flexpert.models`, with settings of its configuration; counted in images."""
    try:
        from flexpert.models.swinv2_moe_config import preset
    except ImportError:
        raise FlexpertError("SwinV2-MoE needs transformers: pip install 'flexpert[vision]'") from None
    config = preset(size, **settings)
    pixels, patch_side = (_square(name, getattr(config, name)) for name in ("image_size", "patch_size"))
    side, labels = pixels // patch_side, config.num_labels or 0
    places = set(config.moe_places())
    patch = config.num_channels * patch_side**2
    blocks = [
        Block(
            name="patches", tokens=side**2, width=patch, params=(patch + 3) * config.embed_dim,
            flops=2 * patch * config.embed_dim, activations=2 * config.embed_dim,
        )
    ]  # fmt: skip
    for stage, depth in enumerate(config.depths):
        dim, tokens = config.embed_dim * 2**stage, (side // 2**stage) ** 2
        window = min(config.window_size, side // 2**stage) ** 2
        for index in range(depth):
            moe = (stage, index) in places
            blocks.append(_swin_block(config, stage, index, tokens, window, moe))
        if stage + 1 < len(config.depths):
            merge = 8 * dim * dim
            blocks.append(
                Block(
                    name=f"merging {stage}", tokens=tokens // 4, width=4 * dim, params=merge + 4 * dim,
                    flops=2 * merge, activations=6 * dim,
                )
            )  # fmt: skip
    classes = dim * labels
    blocks.append(
        Block(
            name="head", tokens=1, width=dim, params=classes + labels + 2 * dim, flops=2 * classes,
            activations=2 * labels,
        )
    )  # fmt: skip
    return Model(name=f"swinv2-moe-{size}", blocks=tuple(blocks), sample="image", dtype=dtype)


def _square(name: str, size: int | list[int] | tuple[int, int]) -> int:
    """The one number of a square's side."""
    if not isinstance(size, int):
        raise ConfigError(f"{name}={size}: the simulator counts square images; give one number")
    return size


def _swin_block(
    config: SwinV2MoEConfig, stage: int, index: int, tokens: int, window: int, moe: bool
) -> Block:
    dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
    hidden = int(config.mlp_ratio * dim)
    attention, mlp = 4 * dim * dim, 2 * dim * hidden
    small = 10 * dim + 513 * heads + 2 * 512  # biases, norms, scales, the network of relative positions
    part, router = None, 0
    if moe:
        layer_config = config.moe_layer(stage)
        part = ExpertPart(
            model_dim=dim,
            hidden_dim=hidden,
            num_experts=layer_config.num_experts,
            top_k=layer_config.top_k,
            capacity_factor=layer_config.capacity_factor,
            bias=layer_config.expert_bias,
        )
        router = dim * layer_config.num_experts
    return Block(
        name=f"stage {stage} block {index}",
        tokens=tokens,
        width=dim,
        params=attention + (router if moe else mlp + hidden) + small,
        flops=2 * (attention + (router if moe else mlp)) + 4 * window * dim,
        activations=8 * dim + 3 * heads * window + (2 * part.num_experts if part else 2 * hidden + dim),
        experts=part,
    )


_LANGUAGE: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"kv_heads": 8},
    "qwen3-30b-a3b": {
        "layers": 48, "model_dim": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "vocabulary": 151936,
        "num_experts": 128, "top_k": 8, "expert_dim": 768,
    },
    "deepseek-moe-16b": {
        "layers": 28, "model_dim": 2048, "heads": 16, "hidden_dim": 10944, "vocabulary": 102400,
        "num_experts": 64, "top_k": 6, "expert_dim": 1408, "shared_dim": 2816, "first": 1,
    },
}  # fmt: skip
_SWIN = {f"swinv2-moe-{size}": size for size in ("tiny", "small", "base")}


def _names() -> list[str]:
    return [*_SWIN, *_LANGUAGE, "layer", "language"]


def _build(name: Any, settings: dict[str, Any]) -> Model:
    if name in _SWIN:
        return swinv2_moe(_SWIN[name], **settings)
    builder: Callable[..., Model] = layer if name == "layer" else language
    if name not in ("layer", "language"):
        if name not in _LANGUAGE:
            raise ConfigError(
                f"model: unknown name {name!r}: {suggest(str(name), _names())}; or a file's name"
            )
        settings = {"name": name, **_LANGUAGE[name], **settings}
    check_options(f"model {name!r}", settings, keyword_names(builder))
    return builder(**settings)
