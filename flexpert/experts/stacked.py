"""Equal modules of one's own, stacked over experts: over ranks, each holds its experts only.

Letters: E experts, N rows, n rows of one expert, D model_dim, O output_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flexpert.core.errors import ConfigError, InputError
from flexpert.core.layout import ParamLayout

from .bank import ExpertBank, ExpertBatch, with_zero_gradients
from .pieces import check_can_be_called


class StackedModules(ExpertBank):
    """Modules of one architecture, each mapping (n, D) rows to (n, O), with values of their own.

    Parameters and buffers are stacked: `module.<name>` is (E, ...). They are cut over ranks as an MLP's are:
    by experts and, where `slice_dims` says how, into slices. The module of an expert
    without rows is not called.

    Args:
        experts: the modules, in order of their slots; copied. They may differ in values alone.
        model_dim: D.
        output_dim: O; None means D.
        slice_dims: from names in one module to the dimension, there, that is its hidden one; the module's
            result must be the sum of its results over slices. None: the experts are never cut.
        once: names, with `slice_dims`, of what enters that sum once (an output bias).
        row_independent: False where a module mixes its rows.

    Raises:
        ConfigError: modules that differ in more than values, tensors that one module shares with itself, or
            names that it does not have.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        *,
        model_dim: int,
        output_dim: int | None = None,
        slice_dims: Mapping[str, int] | None = None,
        once: Collection[str] = (),
        row_independent: bool = True,
    ) -> None:
        modules = list(experts)
        if not modules:
            raise ConfigError("experts is empty: give at least one module")
        check_can_be_called(0, modules[0])
        output_dim = model_dim if output_dim is None else output_dim
        super().__init__(num_experts=len(modules), model_dim=model_dim, output_dim=output_dim)
        _check_equal(modules)
        self.module = _stacked(modules)
        self.sliceable, self.row_independent = slice_dims is not None, row_independent
        self._layout = _layout(modules[0], dict(slice_dims or {}), once)

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Results (N, O) of the rows; see `ExpertBank.forward`. Reads the counts on the host.

        Raises:
            InputError: a module writes to its buffers, of which ranks have copies.
        """
        counts = batch.counts_E.tolist()
        slots = range(len(counts)) if batch.slot_E is None else batch.slot_E.tolist()
        tensors = _tensors(self.module)
        buffers = {name: b for name, b in self.module.named_buffers() if not b.is_inference()}
        versions = {name: buffer._version for name, buffer in buffers.items()}
        parts, called, start = [], False, 0
        for slot, count in zip(slots, counts, strict=True):
            rows = batch.rows_ND[start : start + count]
            start += count
            if count and slot >= 0:
                own = {name: tensor[slot] for name, tensor in tensors.items()}
                parts.append(functional_call(self.module, own, (rows,)))
                called = True
            elif count:
                parts.append(rows.new_zeros(count, self.output_dim))
        parts.append(batch.rows_ND.new_zeros(batch.rows_ND.shape[0] - start, self.output_dim))
        for name, version in versions.items():
            if buffers[name]._version != version:
                raise InputError(
                    f"experts: a module writes to its buffer {name!r}; a stacked module may only read them "
                    f"(batch norm: call eval(), or build it with track_running_stats=False)"
                )
        y_NO = torch.cat([part.to(parts[0].dtype) for part in parts])
        return y_NO if called else with_zero_gradients(y_NO, tensors.values())

    def layout(self) -> dict[str, ParamLayout]:
        """How each parameter and buffer is cut over ranks."""
        return dict(self._layout)

    def flops_of_experts(self) -> list[int]:
        """2 per weight of each `nn.Linear` inside; other modules are not counted."""
        linears = [module for module in self.module.modules() if isinstance(module, nn.Linear)]
        return [sum(2 * module.weight[0].numel() for module in linears)] * self.num_experts


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _facts(module: nn.Module) -> tuple[str, list[tuple[str, torch.Size, torch.dtype]]]:
    return repr(module), [(name, t.shape, t.dtype) for name, t in _tensors(module).items()]


def _check_equal(modules: list[nn.Module]) -> None:
    for place, module in enumerate(modules):
        if _facts(module) != _facts(modules[0]):
            raise ConfigError(
                f"experts: module {place} differs from module 0 in more than values: {_facts(module)} and "
                f"{_facts(modules[0])}; put unlike modules into ModuleExperts"
            )
    every = [name for name, _ in modules[0].named_parameters(remove_duplicate=False)]
    shared = set(every) - {name for name, _ in modules[0].named_parameters()}
    if shared:
        raise ConfigError(
            f"experts: {', '.join(sorted(shared))} share memory with other parameters of the module; use "
            f"ModuleExperts"
        )


@torch.no_grad()
def _stacked(modules: list[nn.Module]) -> nn.Module:
    """One module whose tensors are those of all, (E, ...)."""
    template = copy.deepcopy(modules[0])
    all_ = [_tensors(module) for module in modules]
    for name, tensor in _tensors(template).items():
        whole = torch.stack([tensors[name].detach() for tensors in all_])
        path, _, key = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
        setattr(template.get_submodule(path), key, whole)
    return template


def _layout(module: nn.Module, slice_dims: dict[str, int], once: Collection[str]) -> dict[str, ParamLayout]:
    tensors = _tensors(module)
    for name in {*slice_dims, *once}:
        if name not in tensors:
            raise ConfigError(
                f"slice_dims or once: the module has no {name!r}; it has {', '.join(sorted(tensors))}"
            )
    for name, dim in slice_dims.items():
        if name in once or not 0 <= dim < tensors[name].dim():
            raise ConfigError(
                f"slice_dims[{name!r}]={dim}: expected a dimension of {tuple(tensors[name].shape)}, of a "
                f"tensor that is not in once={tuple(once)}"
            )
    return {
        f"module.{name}": ParamLayout(
            slice_dim=slice_dims[name] + 1 if name in slice_dims else None, once=name in once
        )
        for name in tensors
    }
