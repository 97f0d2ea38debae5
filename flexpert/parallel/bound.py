"""A bank of experts with the parameters of one call in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class _Rows(nn.Module):
    """`bank.rows` as a module's call, for `functional_call`."""

    def __init__(self, bank: Any) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, *args: Tensor | None) -> Tensor:
        y_RO: Tensor = self.bank.rows(*args)
        return y_RO


def rows_with(bank: Any, tensors: Mapping[str, Tensor], *args: Tensor | None) -> Tensor:
    """`bank.rows(*args)` with other parameters and buffers, by their names in the bank."""
    if bank._modules:
        named = {f"bank.{name}": tensor for name, tensor in tensors.items()}
        y_RO: Tensor = functional_call(_Rows(bank), named, args)
        return y_RO
    # Of a bank without modules inside they are entries of two tables: `functional_call` would take as long
    # as a small exchange.
    tables = bank._parameters, bank._buffers
    own = [dict(table) for table in tables]
    try:
        for name, tensor in tensors.items():
            tables[name in tables[1]][name] = tensor
        y_RO = bank.rows(*args)
    finally:
        for table, before in zip(tables, own, strict=True):
            table.update(before)
    return y_RO
