"""Putting a tuner into a model, laid out over ranks or whole on one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.ops.cpu.build import cache_folder
from flexpert.ops.cpu.processor import processor
from flexpert.parallel import ExpertMesh, ExpertParallel
from flexpert.parallel.agree import agree
from flexpert.parallel.together import Ranks
from flexpert.transport import LocalTransport

from . import one_rank
from .cost import Predictor, candidates
from .dictionary import Dictionary
from .gather import Gatherer
from .machine import Machine
from .propose import CostFunction, TunedLayer
from .tuner import Tuner
from .workload import DTYPES, LayerShape, Workload


def cost_of(machine: Machine | None = None) -> CostFunction:
    """The cost function of a machine: forward and backward of a call.

    None, for one rank alone: what its plans compute, which is all that a model knows of them.
    """
    if machine is None:
        return one_rank.work_of

    predictor = Predictor(machine)

    def cost(shape: LayerShape, plan: ExecutionPlan, workload: Workload) -> float:
        return predictor(shape, one_rank.plain(plan), workload) * one_rank.extra_work(shape, plan)

    return cost


def attach(
    model: nn.Module,
    tuner: Tuner,
    *,
    machine: Mapping[str, Any] | None = None,
    dictionary: Path | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Let a tuner choose the plans of a model's MoE layers where a call brings none, or "auto".

    All ranks call it alike, after `flexpert.parallel.parallelize`; one process may do without that: there the
    tuner chooses among capacity modes and kernels. Layers whose experts the cost model does not know (modules
    of one's own, for example) keep their plan.

    Args:
        model: laid out over a mesh, or whole.
        tuner: new; one for each model.
        machine: facts about it, which must be the same for what was learnt before to hold; those of
            `machine_facts` are added.
        dictionary: file of what was learnt before, read by the first rank; see `dictionary_path`.
        dtype: that experts compute in, where it is not that of their parameters (autocast).

    Returns:
        The names of the tuned layers.

    Raises:
        ConfigError: no layer to tune, layers on several meshes, or several ranks without a mesh.
        DistributedError: the ranks' calls differ.
    """
    transports = _transports(model)
    if not transports and Ranks().size == 1:
        return _attach_alone(model, tuner, dict(machine or {}), dictionary, dtype)
    if not transports:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layer laid out over ranks; call "
            f"flexpert.parallel.parallelize(model, mesh) first"
        )
    mesh = next(iter(transports.values()))[0].mesh
    if any(transport.mesh is not mesh for transport, _ in transports.values()):
        raise ConfigError("the model's layers lie on several meshes; attach a tuner to each part of it")
    layers = {name: tuned for name, (t, bank) in transports.items() if (tuned := _tuned(t, bank, dtype))}
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no bank of equal experts (mlp, glu), which the cost model needs"
        )
    place = {**place_of(mesh), **dict(machine or {})}
    facts = {"layers": {name: layer.shape.to_dict() for name, layer in layers.items()}}
    agree("flexpert.tune.attach", facts, list(mesh.everyone.ranks), mesh.timeout)
    group = mesh.extra_group("tuner")
    ranks = Ranks(group.process_group)
    place = ranks.share(place)[0]  # that of the first rank: hosts may differ in what they tell of themselves
    layers = _with_common_kernels(ranks, layers)
    sizes = {name: layer.shape.num_experts for name, layer in layers.items()}
    tuner.connect(layers, place, Gatherer(group, sizes))
    if dictionary is not None:
        tuner.dictionary.merge(_shared(ranks, tuner, Path(dictionary)))
    for name in layers:
        transport, _ = transports[name]
        transport.chooser, transport.plan = tuner, "auto"
    return list(layers)


def _attach_alone(
    model: nn.Module,
    tuner: Tuner,
    machine: dict[str, Any],
    dictionary: Path | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """`attach` for the only process."""
    found = one_rank.local_layers(model)
    layers = {name: tuned for name, (t, bank) in found.items() if (tuned := _tuned(t, bank, dtype))}
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layer with a bank of equal experts (mlp, glu) that can be "
            f"computed in several ways"
        )
    sizes = {name: layer.shape.num_experts for name, layer in layers.items()}
    tuner.connect(layers, {**place_of(None), **machine}, Gatherer(one_rank.group_of_one(), sizes))
    if dictionary is not None:
        tuner.dictionary.take(Path(dictionary), tuner.settings.limits)
    for name in layers:
        transport, _ = found[name]
        transport.chooser, transport.plan = tuner, "auto"
    return list(layers)


def place_of(mesh: ExpertMesh | None) -> dict[str, Any]:
    """Facts of ranks and machine that knowledge about plans depends on; None: of one process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    ranks, each = (1, 1) if mesh is None else (mesh.everyone.size, mesh.ranks_per_node)
    return {
        "ranks": ranks,
        "ranks_per_node": each,
        "threads": torch.get_num_threads(),
        "processor": processor()[0],
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def digest_of(machine: Machine) -> str:
    """A short text for a machine's numbers: predictions made with others are other predictions."""
    text = json.dumps(machine.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def dictionary_path(mesh: ExpertMesh | None, machine: Mapping[str, Any] | None = None) -> Path:
    """The file for such ranks in the user's cache: tune/<digest of the place>.json; None: one process."""
    text = json.dumps({**place_of(mesh), **dict(machine or {})}, sort_keys=True)
    return cache_folder() / "tune" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _shared(ranks: Ranks, tuner: Tuner, path: Path) -> Dictionary:
    """What the file holds, read by the first rank."""

    def read() -> dict[str, Any]:
        found = Dictionary(tuner.dictionary.place, tuner.settings.rows_per_bucket)
        found.take(path, tuner.settings.limits)
        return found.to_dict()

    return Dictionary.from_dict(ranks.first(read), tuner.settings.limits)


def _transports(model: nn.Module) -> dict[str, tuple[ExpertParallel, Any]]:
    """Transport and bank of each layer that is laid out, by the transport's name."""
    modules: list[Any] = list(model.modules())
    found = [m for m in modules if isinstance(getattr(m, "transport", None), ExpertParallel)]
    return {m.transport.name: (m.transport, m.experts) for m in found}


def _tuned(
    transport: ExpertParallel | LocalTransport, experts: Any, dtype: torch.dtype | None
) -> TunedLayer | None:
    """What the tuner needs to know of a layer; None where there is nothing to choose, or nobody knows how."""
    found: tuple[int, LayerShape, slice, Any] | None = None
    first = 0
    for bank in experts.groups().values():
        place = slice(first, first + bank.num_experts)
        first = place.stop
        if not bank.remote or not hasattr(bank, "hidden_dim") or getattr(bank, "w1", None) is None:
            continue
        if isinstance(transport, LocalTransport):
            shape = one_rank.shape_of(bank, dtype)
        else:
            shape = LayerShape.of(transport.mesh, bank, dtype=dtype, verify=transport.verify)
        size = shape.num_experts * shape.params_per_expert
        if found is None or size > found[0]:
            found = size, shape, place, bank
    if found is None:
        return None
    _, shape, place, bank = found
    if not isinstance(transport, LocalTransport):
        plans = [plan for plan in candidates(shape) if _runs(transport, experts, plan)]
        _, *others = bank.kernels(DTYPES[shape.dtype])
        return TunedLayer(shape, place, tuple(plans), tuple(others))
    plans = one_rank.plans_of(transport, experts, bank, DTYPES[shape.dtype])
    return TunedLayer(shape, place, tuple(plans)) if len(plans) > 1 else None


def _with_common_kernels(ranks: Ranks, layers: dict[str, TunedLayer]) -> dict[str, TunedLayer]:
    """The layers with the kernels that every rank has for them; a rank may lack a compiler, for example."""
    everywhere = ranks.share({name: layer.kernels for name, layer in layers.items()})
    return {
        name: dataclasses.replace(
            layer, kernels=tuple(k for k in layer.kernels if all(k in rank[name] for rank in everywhere))
        )
        for name, layer in layers.items()
    }


def _runs(transport: ExpertParallel, experts: Any, plan: ExecutionPlan) -> bool:
    if plan.capacity == "padded" and not transport.verify:
        return False  # buffers must then be equal on all ranks, which nobody checks
    try:
        transport.check(plan, experts)
    except ConfigError:
        return False
    return True
