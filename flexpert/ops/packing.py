"""The layout that the native bf16 kernels multiply by, as tensors.

Columns (rows of a stored matrix) and k come in blocks of 32, filled up with zeros; a block of both is a tile
of [2 halves][16 pairs of k][16 columns][2 k], and tiles lie as products read them: `w1` (S, F blocks, D
blocks, 1024), or (S, F blocks, 2, D blocks, 1024) for a gated MLP; `w2` (S, O blocks, F blocks, 1024).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexpert.core.errors import ConfigError

from .cpu.build import native

BLOCK = 32
TILE = BLOCK * BLOCK


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernels of such weights take packed ones, else why not."""
    if device.type != "cpu":
        return f"weights on {device} have no packed form, only those on cpu"
    if dtype != torch.bfloat16:
        return f"{dtype} weights have no packed form, only torch.bfloat16 ones"
    found = native()
    if found.library is None:
        return f"the native kernels are not there: {found.reason}"
    if (uses := found.instructions(dtype)) == "AVX2":
        return f"the {uses} kernels have no packed form, only those of AVX512_BF16 and AMX"
    return None


def check_conversion(packed: Tensor, convert: Callable[[Tensor], Tensor], remedy: str) -> None:
    """Refuse a conversion of a module, as `Module.to` makes it, under which packed weights cannot stay so.

    Raises:
        ConfigError: it changes dtype or device.
    """
    before = packed.new_empty(0)
    after = convert(before)
    if (after.dtype, after.device) != (before.dtype, before.device):
        raise ConfigError(
            f"weights packed in {before.dtype} on {before.device} cannot become {after.dtype} on "
            f"{after.device}; {remedy}"
        )


def pack(w: Tensor) -> Tensor:
    """(..., C, K) bf16 to (..., C blocks, K blocks, 1024)."""
    *lead, columns, size = w.shape
    padded = torch.nn.functional.pad(w, (0, -size % BLOCK, 0, -columns % BLOCK)).contiguous()
    pairs = padded.view(torch.int32).view(-1, padded.shape[-2] // BLOCK, 2, 16, padded.shape[-1] // BLOCK, 16)
    tiles = pairs.permute(0, 1, 4, 2, 5, 3).contiguous()
    return tiles.view(w.dtype).view(*lead, pairs.shape[1], pairs.shape[4], TILE)


def unpack(packed: Tensor, columns: int, size: int) -> Tensor:
    """(..., C blocks, K blocks, 1024) to (..., C, K), bit for bit what was packed."""
    *lead, column_blocks, size_blocks, _ = packed.shape
    tiles = packed.contiguous().view(torch.int32).view(-1, column_blocks, size_blocks, 2, 16, 16)
    pairs = tiles.permute(0, 1, 3, 5, 2, 4).contiguous()
    padded = pairs.view(packed.dtype).view(*lead, column_blocks * BLOCK, size_blocks * BLOCK)
    return padded[..., :columns, :size].contiguous()


def pack_mlp(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of `grouped_mlp` as `grouped_mlp_packed` takes them."""
    packed = pack(w1)
    return packed.transpose(1, 2).contiguous() if w1.dim() == 4 else packed, pack(w2)


def unpack_mlp(
    w1: Tensor, w2: Tensor, model_dim: int, hidden_dim: int, output_dim: int
) -> tuple[Tensor, Tensor]:
    """What `pack_mlp` was given."""
    first = w1.transpose(1, 2) if w1.dim() == 5 else w1
    return unpack(first, hidden_dim, model_dim), unpack(w2, output_dim, hidden_dim)
