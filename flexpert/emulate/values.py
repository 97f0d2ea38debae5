"""What a rank returns, as bytes: JSON, with tensors beside it in the safetensors format. No code travels."""

from __future__ import annotations

import json
import struct
from typing import Any

from flexpert.core.errors import InputError

HEAD = struct.Struct("<Q")  # length of the JSON part; tensors follow
TUPLE, MAP, TENSOR = "tuple", "map", "tensor"


def encode(value: object) -> bytes:
    """The bytes of a value: None, bool, int, float, str, tensors, and lists, tuples and dicts of these.

    Raises:
        InputError: it has another type in it.
    """
    tensors: dict[str, Any] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    parts = [HEAD.pack(len(text)), text]
    if tensors:
        from safetensors.torch import save

        parts.append(save(tensors))
    return b"".join(parts)


def decode(data: bytes) -> Any:
    """The value of these bytes."""
    (length,) = HEAD.unpack_from(data)
    tensors: dict[str, Any] = {}
    if len(data) > HEAD.size + length:
        from safetensors.torch import load

        tensors = load(data[HEAD.size + length :])
    return _rich(json.loads(data[HEAD.size : HEAD.size + length]), tensors)


def _plain(value: object, tensors: dict[str, Any]) -> object:
    """Lists are lists; everything else that is no plain value is {kind: content}."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {TUPLE: [_plain(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {MAP: [[_plain(key, tensors), _plain(item, tensors)] for key, item in value.items()]}
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    raise InputError(
        f"a rank returned a {type(value).__name__}; it may return None, bool, int, float, str, tensors, "
        "and lists, tuples and dicts of these"
    )


def _rich(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_rich(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == TUPLE:
        return tuple(_rich(item, tensors) for item in content)
    return {_rich(key, tensors): _rich(item, tensors) for key, item in content}
