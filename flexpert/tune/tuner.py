"""The tuner: which plan each layer runs in each step, the same on all ranks, and what was learnt of it.

A step's time is measured as a whole, not layer by layer. It is what one wants to be short; gathers of
parameters, their gradients' sums and averages run outside of a layer's own forward and backward; and in a
layer, the time of the rank that comes first is mostly waiting for the one that comes last. So that one step
tells of one choice, only one bucket tries a plan at a time while all others keep theirs.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.plan import ExecutionPlan
from flexpert.core.recomputing import recomputing

from .bucket import Bucket
from .candidate import describe
from .dictionary import Dictionary, Key
from .gather import Gatherer, News, Seen
from .log import PlanLog, Plans
from .propose import CostFunction, TunedLayer, propose
from .report import report
from .settings import TunerSettings

_log = logging.getLogger("flexpert")

_CALM, _SELDOM = 8, 4  # after so many sums that brought nothing new only every so many steps has one
_SKIPPED = 2  # first steps of a run, which allocate and warm up, are not measured


@dataclass
class _Step:
    """A step under way, or just over."""

    plans: Plans
    keys: dict[str, Key]
    trial: Key | None
    replayed: bool
    seconds: float | None = None


class Tuner:
    """Chooses plans; give it to `flexpert.tune.attach`, and put every step in `with tuner.step():`.

    All that it decides is a function of sums over the ranks, so that all ranks decide alike.

    Args:
        cost: predicts the seconds of a call; see `flexpert.tune.cost_of`.
        settings: how.
        initial: the plan of the first step, before anything is known of the rows.
        log: gets the plans of each step; on one rank.
        clock: seconds, of this rank.

    Attributes:
        layers: those that are tuned, by name.
        dictionary: what is known; empty until `attach`.
        replay: plans of steps to repeat, by step.
        steps, trials: that ran, and those of them that tried a plan.
    """

    def __init__(
        self,
        cost: CostFunction,
        settings: TunerSettings | None = None,
        *,
        initial: ExecutionPlan | None = None,
        log: PlanLog | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = TunerSettings() if settings is None else settings
        self.layers: dict[str, TunedLayer] = {}
        self.dictionary = Dictionary({}, self.settings.rows_per_bucket)
        self.replay: dict[int, Plans] = {}
        self.log = log
        self.steps = self.trials = 0
        self._cost, self._clock = cost, clock
        self._initial = ExecutionPlan() if initial is None else initial
        self._gatherer: Gatherer | None = None
        self._known: dict[str, Seen] = {}
        self._calm = 0  # sums in a row that brought nothing new
        self._now: _Step | None = None
        self._last: _Step | None = None
        self._plans: Plans = {}

    def connect(self, layers: Mapping[str, TunedLayer], place: Mapping[str, Any], gatherer: Gatherer) -> None:
        """Take over these layers; `attach` calls this.

        Raises:
            ConfigError: it has layers already.
        """
        if self._gatherer is not None:
            raise ConfigError("this tuner is attached to a model already; make one for each model")
        self.layers, self._gatherer = dict(layers), gatherer
        self.dictionary = Dictionary(place, self.settings.rows_per_bucket)
        self._plans = dict.fromkeys(layers, self._initial)

    @contextmanager
    def step(self, number: int | None = None) -> Iterator[None]:
        """Around one step of training: forward, backward and optimiser.

        Plans change between steps only. An error inside leaves the step unmeasured.

        Args:
            number: of the step, for the log; None counts.
        """
        if self._gatherer is None:
            raise ConfigError("this tuner has no model: call flexpert.tune.attach(model, tuner) first")
        if self._now is not None:
            raise ConfigError("tuner.step() inside tuner.step(): a step has no step in it")
        number = self.steps if number is None else number
        self._gatherer.begin(self._calm < _CALM or self.steps % _SELDOM == 0)
        self._now = self._choose(number)
        self._plans.update(self._now.plans)
        if self.log is not None:
            self.log.write(number, self._plans, self._now.trial is not None)
        begin = self._clock()
        try:
            yield
            self._now.seconds = self._clock() - begin if self.steps >= _SKIPPED else None
            news = self._gatherer.end(None if self._last is None else self._last.seconds)
            if news is not None:
                self._learn(news)
            self._last, self._now = self._now, None
            self.steps += 1
        except BaseException:
            self._last = self._now = None
            raise

    def plan_for(self, name: str, counts: Sequence[int], capacity: int | None, tokens: int) -> ExecutionPlan:
        """The plan of a call; see `flexpert.parallel.chooser.PlanChooser`.

        Outside of a step it is the one of the last step, and nothing is noted.

        Raises:
            DistributedError: a layer that `attach` did not see.
        """
        if name not in self._plans:
            raise DistributedError(
                f"{name}: the tuner does not know this layer; attach it to the whole model"
            )
        if self._now is not None and not recomputing():
            assert self._gatherer is not None
            own = list(counts)[self.layers[name].experts]
            self._gatherer.add(
                name, own, capacity, tokens, None if self._last is None else self._last.seconds
            )
        return self._plans[name]

    def report(self) -> dict[str, Any]:
        """Steps, trials and their share, and of each bucket what was tried and why its winner won."""
        return report(self.dictionary, self.settings, self.steps, self.trials, list(self.layers))

    @property
    def plans(self) -> Plans:
        """The plan of each layer in this step, or the last one."""
        return dict(self._plans)

    def describe_plans(self) -> str:
        """The plans that run now, in a line: each with the number of its layers."""
        texts = [describe(plan) for plan in self._plans.values()]
        unique = dict.fromkeys(texts)
        if len(unique) == 1:
            return texts[0]
        return "; ".join(f"{texts.count(text)} x {text}" for text in unique)

    def save(self, path: Path) -> None:
        """Merge the dictionary into a file; one rank calls this.

        Raises:
            ConfigError: the file cannot be written.
        """
        if self.log is not None:
            self.log.flush()
        self.dictionary.save(path)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, as plain data (JSON)."""
        if self.log is not None:
            self.log.flush()
        known = {name: [list(s.counts), s.capacity, s.tokens] for name, s in self._known.items()}
        return {
            "dictionary": self.dictionary.to_dict(),
            "known": known,
            "steps": self.steps,
            "trials": self.trials,
            "calm": self._calm,
            "plans": {name: plan.to_dict() for name, plan in self._plans.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; what belongs to another place is left out, and that is logged.

        Call it after `attach`, on every rank with the same state.

        Raises:
            ConfigError: a damaged state.
        """
        found = Dictionary.from_dict(state["dictionary"], self.settings.limits)
        try:
            self.dictionary.check_place(found)
        except ConfigError as error:
            _log.info("the tuner begins anew: %s", error)
            return
        self.dictionary.merge(found)
        if state["known"].keys() != self.layers.keys():
            return
        self._known = {name: Seen(tuple(c), cap, t) for name, (c, cap, t) in state["known"].items()}
        self._plans = {name: ExecutionPlan.from_dict(plan) for name, plan in state["plans"].items()}
        self.steps, self.trials = int(state["steps"]), int(state["trials"])
        self._calm = int(state.get("calm", 0))

    def _choose(self, number: int) -> _Step:
        """The plans of a step, from what is known before it."""
        keys = self._keys()
        entries = self.dictionary.entries
        for name, key in keys.items():
            if key not in entries:
                layer, seen = self.layers[name], self._known[name]
                entries[key] = propose(layer, seen, key, self.dictionary, self._cost, self.settings.limits)
        plans = {name: entries[key].plan for name, key in keys.items()}
        if number in self.replay:
            plans = {name: plan for name, plan in self.replay[number].items() if name in self.layers}
            return _Step(plans, keys, None, replayed=True)
        step = _Step(plans, keys, None, replayed=False)
        waits = self._last is not None and self._last.trial is not None  # for the time of that trial
        may = self.trials + 1 <= self.settings.burst + self.settings.share * self.steps
        if self.settings.deterministic or waits or not may:
            return step
        wanted = {}
        for key in dict.fromkeys(keys.values()):
            entries[key].spare(self.dictionary.lost_kernels(*key))
            plan = entries[key].next(_context(step, key))
            if plan is not None:
                weight = sum(k == key for k in keys.values()) * entries[key].predicted
                wanted[key] = weight, plan
        if wanted:
            step.trial = max(wanted, key=lambda key: wanted[key][0])
            self.trials += 1
            plan = wanted[step.trial][1]
            step.plans.update({name: plan for name, key in keys.items() if key == step.trial})
        return step

    def _learn(self, news: News) -> None:
        """Take in a sum: the workload of the step that ends, the time of the step before it."""
        before = self._keys()
        self._known.update(news.layers)
        if news.seconds is not None:
            self._measure(news.seconds)
        keys = self._keys()
        self._calm = self._calm + 1 if keys == before and all(map(self._done, keys.values())) else 0

    def _done(self, key: Key) -> bool:
        entry = self.dictionary.entries.get(key)
        return self.settings.deterministic or (entry is not None and entry.settled)

    def _measure(self, seconds: float) -> None:
        """Note the time of the last step."""
        last = self._last
        if last is None or last.replayed or self.settings.deterministic:
            return
        for key in [last.trial] if last.trial is not None else list(dict.fromkeys(last.keys.values())):
            plan = next(last.plans[name] for name, k in last.keys.items() if k == key)
            entry = self.dictionary.entries[key]
            if key == last.trial or plan == entry.plan:  # else a former leader
                entry.record(plan, seconds, _context(last, key), self.settings.band)

    def _keys(self) -> dict[str, Key]:
        """Shape and bucket of each layer, as far as known."""
        return {name: (self.layers[name].shape, self._bucket(seen)) for name, seen in self._known.items()}

    def _bucket(self, seen: Seen) -> Bucket:
        return Bucket.of(seen.counts, self._ranks, seen.capacity, self.settings.rows_per_bucket)

    @property
    def _ranks(self) -> int:
        return next(iter(self.layers.values())).shape.world


def _context(step: _Step, key: Key) -> int:
    """A number for the plans of all other layers: a step's time tells of a plan only beside the same ones."""
    others = [
        f"{name} {plan.encode()}" for name, plan in sorted(step.plans.items()) if step.keys[name] != key
    ]
    return zlib.crc32("\n".join(others).encode())
