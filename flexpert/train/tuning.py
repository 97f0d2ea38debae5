"""The tuner of a run: made when it starts, saved with its checkpoints, its choices logged in its folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.parallel import ExpertMesh
from flexpert.parallel.together import Ranks
from flexpert.tune import (
    Machine,
    PlanLog,
    Tuner,
    TunerSettings,
    attach,
    cost_of,
    dictionary_path,
    digest_of,
)
from flexpert.tune.calibrate import calibrate, store, stored
from flexpert.tune.one_rank import plain

_log = logging.getLogger("flexpert")

PLANS, KNOWN = "plans.jsonl", "tuner.json"  # in a run's folder: every step's plan, and what is known of plans


class Tuning:
    """The tuner of a model that is laid out over the ranks of a mesh; every rank makes one.

    The machine is measured once, which takes some seconds, and kept in the user's cache and in checkpoints.

    Args:
        model: after `parallelize`.
        mesh: of its experts.
        dtype: that experts compute in.
        deterministic: see `TunerSettings`.

    Raises:
        ConfigError: no layer that can be tuned.
    """

    def __init__(self, model: nn.Module, mesh: ExpertMesh, dtype: torch.dtype, deterministic: bool) -> None:
        self._ranks, self._mesh = Ranks(), mesh
        self._machine = _machine(mesh, dtype, self._ranks)
        facts = {"machine": digest_of(self._machine)}
        self._cache = self._cache_of(facts)
        self.tuner = Tuner(cost_of(self._machine), TunerSettings(deterministic=deterministic))
        attach(model, self.tuner, machine=facts, dictionary=self._cache, dtype=dtype)
        self._folder: Path | None = None

    def begin(self, folder: Path, step: int, state: Mapping[str, Any] | None) -> None:
        """Go on after so many steps: with what a checkpoint knew, and the plans of steps that ran after it.

        Args:
            folder: of the run.
            step: number of the first step.
            state: of `state`, from the checkpoint; None without.
        """
        self._folder = folder
        if state is not None:
            self._recall(state.get("machine"))
            self.tuner.load_state_dict(state)

        def rewind() -> list[Any]:
            self.tuner.log = PlanLog(folder / PLANS)
            cut = self.tuner.log.rewind(step)
            return [[n, {name: plan.to_dict() for name, plan in plans.items()}] for n, plans in cut.items()]

        replay = {
            number: {name: ExecutionPlan.from_dict(plan) for name, plan in plans.items()}
            for number, plans in self._ranks.first(rewind)
        }
        known = set(self.tuner.layers)
        legal = {*next(iter(self.tuner.layers.values())).plans, ExecutionPlan()}  # ranks may be others now
        ran = {plain(plan) for plans in replay.values() for plan in plans.values()}
        if all(plans.keys() == known for plans in replay.values()) and ran <= legal:
            self.tuner.replay = replay

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around one step."""
        return self.tuner.step(number)

    def state(self) -> dict[str, Any]:
        """For the checkpoint; rank 0 also writes it into the run's folder, for `flexpert tune --explain`."""
        if self._ranks.rank == 0 and self._folder is not None:
            self.tuner.save(self._folder / KNOWN)
        return {**self.tuner.state_dict(), "machine": self._machine.to_dict()}

    def finish(self) -> None:
        """Keep what was learnt for other runs, where the user's cache can be written to."""
        if self._ranks.rank == 0:
            _keep("what was learnt of plans", lambda: self.tuner.save(self._cache))

    def _recall(self, data: Any) -> None:
        """Go on with the machine's numbers that the run began with, if they are of such ranks.

        Measured anew, in a fresh cache, they differ a little, and what the run has learnt would not hold.
        """
        try:
            machine = Machine.from_dict(data or {})
        except ConfigError:
            return
        if _told(machine) != _told(self._machine) or machine.rates.keys() != self._machine.rates.keys():
            return
        facts = {"machine": digest_of(machine)}
        if facts != {"machine": digest_of(self._machine)}:
            self._machine, self._cache = machine, self._cache_of(facts)
            self.tuner.predict_with(cost_of(machine), facts)

    def _cache_of(self, facts: Mapping[str, Any]) -> Path:
        """The file of what is known of plans on such a machine."""
        return Path(self._ranks.first(lambda: str(dictionary_path(self._mesh, facts))))


class NoTuning:
    """Plans that stay as they are."""

    tuner: Tuner | None = None

    def begin(self, folder: Path, step: int, state: Mapping[str, Any] | None) -> None:
        """Nothing."""

    def step(self, number: int) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def state(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def finish(self) -> None:
        """Nothing."""


def make_tuning(
    model: nn.Module, mesh: ExpertMesh, dtype: torch.dtype, deterministic: bool
) -> Tuning | NoTuning:
    """A tuner for the model, or none where its experts are of kinds that the cost model does not know."""
    try:
        return Tuning(model, mesh, dtype, deterministic)
    except ConfigError as error:
        _log.warning("plans are not tuned, the default one runs: %s", error)
        return NoTuning()


def _machine(mesh: ExpertMesh, dtype: torch.dtype, ranks: Ranks) -> Machine:
    """The machine of these ranks, for one dtype: as it was measured before, else measured now."""
    name = str(dtype).removeprefix("torch.")

    def read() -> str:
        machine = stored(mesh)
        return "" if machine is None else machine.to_json()

    text = ranks.first(read)
    known = Machine.from_json(text) if text else None
    if known is not None and name in known.rates:
        return known.only(name)
    if ranks.rank == 0:
        _log.info("measuring the ranks' machine, once, for the tuner")
    machine = calibrate(dtypes=(name,), ranks_per_node=mesh.ranks_per_node)
    if known is not None:  # other numbers would be another machine, of whose plans nothing is known
        machine = dataclasses.replace(known, rates={**known.rates, **machine.rates})
    if ranks.rank == 0:
        _keep("the machine's numbers", lambda: store(machine))
    return machine.only(name)


def _told(machine: Machine) -> dict[str, Any]:
    """What the machine says of itself, but for how long it took to measure it."""
    return {name: value for name, value in machine.facts.items() if name != "seconds"}


def _keep(what: str, write: Callable[[], object]) -> None:
    """Write to the user's cache; where that cannot be, the run goes on without."""
    try:
        write()
    except ConfigError as error:
        _log.warning("%s: not kept for other runs: %s", what, error)
