"""Equal feed-forward experts with stacked weights: two-layer MLPs and gated linear units."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from flexpert import ops
from flexpert.core.config import check_bias, require_bool, require_int, require_number
from flexpert.core.layout import ParamLayout
from flexpert.core.registry import EXPERTS
from flexpert.core.routing import Routing
from flexpert.core.seeding import Constant, Drawn, draw_base, draw_trunc_normal, draw_uniform
from flexpert.ops.activations import get_activation
from flexpert.ops.memory import prefer_huge_pages

from .bank import ExpertBatch, autocast_dtype, cast, weighted_sum
from .batched import batched_mlp, place_of_rows
from .packed import PackableBank


class MLPExperts(PackableBank):
    """Experts y = act(x W1^T + b1) W2^T + b2, each stored as `nn.Linear` stores it, stacked.

    Parameters: `w1` (E, F, D), `w2` (E, O, F), `b1` (E, F), `b2` (E, O).

    Args:
        num_experts: E.
        model_dim: D.
        hidden_dim: F.
        output_dim: O; None means D.
        activation: name; see `flexpert.ops.activations`.
        bias: False, True, "b1" or "b2".
        init_std: standard deviation of truncated-normal initial weights; None for uniform ones in
            1 / sqrt(fan_in), as `nn.Linear`. Biases start at 0.
        recompute: keep nothing of the hidden layer for backward, which then computes it again. `fused`
            gives the same bits with it; `forward`, which then uses the fused operator, rounds differently.
    """

    gated = False
    sliceable = True
    has_fused = True

    def __init__(
        self,
        *,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        output_dim: int | None = None,
        activation: str = "gelu",
        bias: bool | str = False,
        init_std: float | None = None,
        recompute: bool = False,
    ) -> None:
        output_dim = model_dim if output_dim is None else output_dim
        super().__init__(num_experts=num_experts, model_dim=model_dim, output_dim=output_dim)
        require_int("hidden_dim", hidden_dim, least=1)
        get_activation(activation)  # an unknown name is refused here
        check_bias("bias", bias)
        if init_std is not None:
            require_number("init_std", init_std, above=0)
        require_bool("recompute", recompute)
        self.hidden_dim, self.activation, self.init_std = hidden_dim, activation, init_std
        self.recompute = recompute
        hidden = (2, hidden_dim) if self.gated else (hidden_dim,)
        self.w1 = nn.Parameter(torch.empty(num_experts, *hidden, model_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, self.output_dim, hidden_dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, *hidden)) if bias in (True, "b1") else None
        self.b2 = nn.Parameter(torch.zeros(num_experts, self.output_dim)) if bias in (True, "b2") else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, each expert's from a generator of its own; biases become 0."""
        base = draw_base()
        for name, weight in (("w1", self.w1), ("w2", self.w2)):
            if self.init_std is None:
                draw = partial(draw_uniform, bound=weight.shape[-1] ** -0.5)
            else:
                draw = partial(draw_trunc_normal, std=self.init_std)
            self.initial[name] = Drawn(base, name, draw)
        self.initial |= {"b1": Constant(0.0), "b2": Constant(0.0)}
        for name, parameter in self.named_parameters(recurse=False):
            self.initial[name].fill(parameter)

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; see `ExpertBank.forward`."""
        rows_ND = batch.rows_ND.to(autocast_dtype(batch.rows_ND))
        if self.recompute or self.is_packed:  # of the operators here, the fused one alone can
            every_N = torch.arange(len(rows_ND), device=rows_ND.device)
            return self._fused(rows_ND, every_N, None, batch.counts_E, batch.slot_E)
        w1, b1, w2, b2 = self.weights_in(rows_ND.dtype)
        act = get_activation(self.activation).forward
        hidden = ops.grouped_linear(
            rows_ND, w1.flatten(1, -2), None if b1 is None else b1.flatten(1), batch.counts_E, batch.slot_E
        )
        if self.gated:
            gate_NF, up_NF = hidden.chunk(2, dim=-1)
            hidden = act(gate_NF) * up_NF
        else:
            hidden = act(hidden)
        return ops.grouped_linear(hidden, w2, b2, batch.counts_E, batch.slot_E)

    def fused(self, x_TD: Tensor, routing: Routing, slot_E: Tensor | None = None) -> Tensor:
        """Gather, experts and weighted sum in one operator; see `ExpertBank.fused`."""
        x = x_TD.to(autocast_dtype(x_TD))
        if self._wanted() == "separate":
            rows_ND = ops.gather_rows(x, routing.unit_N, routing.counts_E)
            batch = ExpertBatch(
                rows_ND=rows_ND, counts_E=routing.counts_E, unit_N=routing.unit_N, slot_E=slot_E
            )
            return weighted_sum(self(batch), routing, x_TD.dtype)
        return self._fused(x, routing.unit_N, routing.weight_N, routing.counts_E, slot_E).to(x_TD.dtype)

    def routed(self, x_TD: Tensor, choice: ops.TokenChoice) -> Tensor | None:
        """Routing and `fused` in one operator; see `ExpertBank.routed`."""
        plain = type(self).fused is MLPExperts.fused and "fused" not in vars(self)
        w1: Tensor | None = self._parameters.get("w1")
        w2: Tensor | None = self._parameters.get("w2")
        packed = None
        if plain and self.is_packed:
            w1, w2, packed = self.packed_w1, self.packed_w2, (self.hidden_dim, self.output_dim)
        if not plain or w1 is None or w2 is None or w1.dtype != x_TD.dtype or not x_TD.is_cpu:
            return None
        prefer_huge_pages(w1)
        prefer_huge_pages(w2)
        return ops.routed_mlp(
            x_TD, choice, ops.ExpertMLP(w1, self.b1, w2, self.b2, self.activation, packed=packed)
        )

    def padded(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """As `fused`, by batched products over buffers of equal size; see `ExpertBank.padded`."""
        x = x_TD.to(autocast_dtype(x_TD))
        if not self.pads(x.dtype):
            return self.fused(x_TD, routing)
        rows_ND = ops.gather_rows(x, routing.unit_N, routing.counts_E)
        act, weights = get_activation(self.activation), self.weights_in(x.dtype)
        rows_NO = batched_mlp(rows_ND, *place_of_rows(routing), weights, act, self.gated)
        return weighted_sum(rows_NO, routing, x_TD.dtype)

    def pads(self, dtype: torch.dtype) -> bool:
        """See `ExpertBank.pads`; oneDNN's products in half precision mix rows of other widths than tiles."""
        whole_tiles = self.model_dim % 32 == self.hidden_dim % 32 == 0
        return not self.is_packed and not self.recompute and (dtype.itemsize != 2 or whole_tiles)

    def kernels(self, dtype: torch.dtype) -> list[str]:
        """Of this bank's device; see `ExpertBank.kernels`."""
        if self.is_packed:
            return ["auto"]
        _, *others = ops.able("grouped_mlp", self.w1.device.type, dtype)
        more = [] if self.recompute else ["recompute", "separate"]
        return ["auto", *others, *more]

    def rows(self, x_RD: Tensor, unit_N: Tensor, counts_E: Tensor, slot_E: Tensor | None = None) -> Tensor:
        """Results in place, in one operator; see `ExpertBank.rows`."""
        if self._wanted() == "separate":
            return super().rows(x_RD.to(autocast_dtype(x_RD)), unit_N, counts_E, slot_E)
        return self._fused(x_RD.to(autocast_dtype(x_RD)), unit_N, None, counts_E, slot_E)

    def layout(self) -> dict[str, ParamLayout]:
        """Cut on the hidden dimension; `b2` is added once."""
        hidden = self.w1.dim() - 2  # (E, F, D), or (E, 2, F, D) of a gated bank
        layouts = {"w1": ParamLayout(slice_dim=hidden), "w2": ParamLayout(slice_dim=2)}
        if self.b1 is not None:
            layouts["b1"] = ParamLayout(slice_dim=hidden)
        if self.b2 is not None:
            layouts["b2"] = ParamLayout(slice_dim=None, once=True)
        return layouts

    def _wanted(self) -> str:
        """The kernel that the caller wants; a compiled graph computes as usual."""
        return "auto" if torch.compiler.is_compiling() else ops.wanted_kernel()

    def _fused(
        self, x_TD: Tensor, unit_N: Tensor, weight_N: Tensor | None, counts_E: Tensor, slot_E: Tensor | None
    ) -> Tensor:
        """`ops.grouped_mlp` with the bank's weights, in x's dtype."""
        if self.is_packed:
            return self._fused_packed(x_TD, unit_N, weight_N, counts_E, slot_E)
        if isinstance(self.w1, nn.Parameter) and not torch.compiler.is_compiling():  # not gathered for a call
            prefer_huge_pages(self.w1)
            prefer_huge_pages(self.w2)
        w1, b1, w2, b2 = self.weights_in(x_TD.dtype)
        recompute = self.recompute or self._wanted() == "recompute"
        return ops.grouped_mlp(
            x_TD, unit_N, weight_N, counts_E, slot_E, w1, b1, w2, b2, self.activation, recompute
        )

    def flops_of_experts(self) -> list[int]:
        """2 per weight."""
        inner = (2 if self.gated else 1) * self.model_dim
        return [2 * self.hidden_dim * (inner + self.output_dim)] * self.num_experts

    def weights_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(w1, b1, w2, b2) in the dtype of a computation; copies where the weights are packed."""
        w1, w2 = self._unpacked() if self.is_packed else (self.w1, self.w2)
        return w1.to(dtype), cast(self.b1, dtype), w2.to(dtype), cast(self.b2, dtype)

    def extra_repr(self) -> str:
        """Shapes and activation, for `print(module)`."""
        sizes = f"E={self.num_experts}, D={self.model_dim}, F={self.hidden_dim}"
        return f"{sizes}, activation={self.activation}{', packed' if self.is_packed else ''}"


class GLUExperts(MLPExperts):
    """Gated experts y = (act(x Wg^T + bg) * (x Wu^T + bu)) W2^T + b2 (Shazeer, arXiv 2002.05202).

    Parameters: `w1` (E, 2, F, D), gate first; `w2` (E, O, F); `b1` (E, 2, F); `b2` (E, O).
    """

    gated = True


EXPERTS.register("mlp")(MLPExperts)
EXPERTS.register("glu")(GLUExperts)
