"""All-to-all of rows: each rank sends every other the rows of its experts, and gets them back.

One object per algorithm, all with the same face and the same results bit for bit:
- `Linear` sends every rank its part directly;
- `hierarchical.Hierarchical` goes by way of the ranks of its own node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexpert.core.errors import DistributedError, InputError

from .codec import NONE, Codec
from .group import Group
from .parts import one_each
from .splits import Splits


class PendingRows:
    """Rows under way."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._rows: Tensor
        self._failure = ""  # not the error itself: with its traceback it would hold what it happened to

    def wait(self) -> Tensor:
        """The rows that arrived; the same tensor each time.

        Raises:
            DistributedError: the exchange failed.
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None  # it holds buffers
            try:
                self._rows = finish()
            except DistributedError as error:
                self._failure = str(error)
                raise
        if self._failure:
            raise DistributedError(self._failure)
        return self._rows


class AllToAll(ABC):
    """An algorithm of exchange on one group.

    All ranks must make the same calls, and waits, in the same order.

    Attributes:
        name: of the algorithm.
        group: of P ranks.
    """

    name: ClassVar[str]

    def __init__(self, group: Group) -> None:
        self.group = group

    def exchange_counts(self, counts_PC: Tensor) -> Splits:
        """Tell each rank how many rows it will get; waits for the answer of the others.

        Args:
            counts_PC: int64, rows for each destination and class, the experts of the destination.

        Raises:
            InputError: another shape or dtype.
            DistributedError: the exchange failed.
        """
        return self.exchange_counts_with_header(counts_PC.new_empty(0, dtype=torch.int64), counts_PC)[1]

    def exchange_counts_with_header(self, header_H: Tensor, counts_PC: Tensor) -> tuple[Tensor, Splits]:
        """As `exchange_counts`, with numbers for every rank in the same messages.

        Args:
            header_H: int64, of the same length on all ranks.
            counts_PC: as in `exchange_counts`.

        Returns:
            the headers of all ranks (P, H), and the splits.
        """
        size = self.group.size
        for name, tensor, dim in (("header_H", header_H, 1), ("counts_PC", counts_PC, 2)):
            if tensor.dtype != torch.int64 or tensor.dim() != dim:
                raise InputError(
                    f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}; int64 with {dim} dimensions "
                    "expected"
                )
        if counts_PC.shape[0] != size:
            raise InputError(f"counts_PC has {counts_PC.shape[0]} destinations; the group has {size} ranks")
        message_PV = torch.cat([header_H.expand(size, -1), counts_PC], 1)
        headers, splits = self.exchange_messages(message_PV, len(header_H))
        return header_H.new_tensor(headers).view(size, -1), splits

    @abstractmethod
    def exchange_messages(self, message_PV: Tensor, header: int) -> tuple[list[list[int]], Splits]:
        """Headers of all ranks, and splits: a message has `header` numbers, then the counts."""

    @abstractmethod
    def known(self, matrix_PPC: Tensor) -> Splits:
        """The splits of an exchange that all ranks know: rows by source, destination and class."""

    def start(
        self,
        rows_ND: Tensor,
        splits: Splits,
        *,
        chunk: int = 0,
        degree: int = 1,
        reverse: bool = False,
        codec: Codec = NONE,
    ) -> PendingRows:
        """Send the rows of one chunk; they are under way when this returns.

        Nothing is recorded for autograd.

        Args:
            rows_ND: the chunk's rows, in order of (destination, class); with `reverse` those that the forward
                exchange of this chunk brought, in order of (source, class). Without a codec a row may have
                any shape.
            splits: from one of the methods above.
            chunk: which of `degree`; it has its share of every segment, see `splits.py`.
            degree: number of chunks.
            reverse: send rows back to where they came from.
            codec: the form in which they travel.

        Returns:
            the rows that arrive: forward in order of (source, class), in reverse of (destination, class).

        Raises:
            InputError: the number of rows is not that of the chunk.
            DistributedError: the exchange failed.
        """
        part = splits.chunk(chunk, degree)
        expected = (part.reverse if reverse else part.forward).leaving
        if len(rows_ND) != expected:
            way = "back" if reverse else "forward"
            raise InputError(
                f"{len(rows_ND)} rows given to be sent {way}; chunk {chunk} of {degree} has {expected}"
            )
        rows_ND = rows_ND.detach() if rows_ND.requires_grad else rows_ND
        if codec is NONE:
            return PendingRows(self._start(rows_ND, part, chunk, reverse))
        if rows_ND.dim() != 2:
            raise InputError(f"codec {codec.name!r} is for rows (N, D); got {tuple(rows_ND.shape)}")
        arrive = self._start(codec.encode(rows_ND), part, chunk, reverse)
        dtype, width = rows_ND.dtype, rows_ND.shape[-1]
        return PendingRows(lambda: codec.decode(arrive(), dtype, width))

    @abstractmethod
    def _start(self, wire: Tensor, part: Splits, chunk: int, reverse: bool) -> Callable[[], Tensor]:
        """Send encoded rows of a chunk whose splits are `part`; the result waits for those that arrive."""


class Linear(AllToAll):
    """Every rank sends each other rank its part directly: one collective, P - 1 messages per rank."""

    name = "linear"

    def exchange_messages(  # noqa: D102 - as inherited
        self, message_PV: Tensor, header: int
    ) -> tuple[list[list[int]], Splits]:
        received_PV = torch.empty_like(message_PV)
        self.group.exchange(received_PV, message_PV, one_each(self.group.size)).wait()
        received = received_PV.tolist()
        sent = [row[header:] for row in message_PV.tolist()]
        return [row[:header] for row in received], Splits(sent, [row[header:] for row in received])

    def known(self, matrix_PPC: Tensor) -> Splits:  # noqa: D102 - as inherited
        rank = self.group.rank
        return Splits(matrix_PPC[rank].tolist(), matrix_PPC[:, rank].tolist())

    def _start(self, wire: Tensor, part: Splits, chunk: int, reverse: bool) -> Callable[[], Tensor]:
        parts = part.reverse if reverse else part.forward
        output = wire.new_empty(parts.arriving, *wire.shape[1:])
        pending = self.group.exchange(output, wire, parts, chunk)

        def arrive() -> Tensor:
            pending.wait()
            return output

        return arrive


def all_to_all(x_ND: Tensor, algorithm: AllToAll, splits: Splits, codec: Codec = NONE) -> Tensor:
    """Exchange rows; the gradient goes the same way back, on the same group.

    Args:
        x_ND: rows in order of (destination, class).
        algorithm: which exchange.
        splits: from its `exchange_counts` or `known`.
        codec: the form in which rows travel, and gradients too: rounding passes them on as if it were none.

    Returns:
        rows in order of (source, class); differentiable any number of times.
    """
    rows: Tensor = _Exchange.apply(x_ND, algorithm, splits, codec, False)
    return rows


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, algorithm: AllToAll, splits: Splits, codec: Codec, reverse: bool
    ) -> Tensor:
        ctx.call = algorithm, splits, codec, reverse
        return algorithm.start(x, splits, reverse=reverse, codec=codec).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        algorithm, splits, codec, reverse = ctx.call
        return _Exchange.apply(grads[0], algorithm, splits, codec, not reverse), None, None, None, None
