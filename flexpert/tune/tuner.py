"""The tuner: which plan each layer runs in each step, the same on all ranks, and what was learnt of it.

A step's time is measured as a whole, not layer by layer. It is what one wants to be short; gathers of
parameters, their gradients' sums and averages run outside of a layer's own forward and backward; and in a
layer, the time of the rank that comes first is mostly waiting for the one that comes last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.core.plan import ExecutionPlan
from flexpert.core.recomputing import recomputing

from .candidate import describe
from .choices import Choices, Step
from .dictionary import Dictionary
from .gather import Gatherer, Seen
from .log import PlanLog, Plans
from .propose import CostFunction, TunedLayer
from .report import report
from .settings import TunerSettings

_log = logging.getLogger("flexpert")

_SKIPPED = 2  # first steps of a run, which allocate and warm up, are not measured


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
        self.replay: dict[int, Plans] = {}
        self.log = log
        self.steps = 0
        self._cost, self._clock = cost, clock
        self._initial = ExecutionPlan() if initial is None else initial
        self._gatherer: Gatherer | None = None
        self._choices = self._choices_for({}, {})
        self._now: Step | None = None
        self._last: Step | None = None
        self._plans: Plans = {}

    def connect(self, layers: Mapping[str, TunedLayer], place: Mapping[str, Any], gatherer: Gatherer) -> None:
        """Take over these layers; `attach` calls this.

        Raises:
            ConfigError: it has layers already.
        """
        if self._gatherer is not None:
            raise ConfigError("this tuner is attached to a model already; make one for each model")
        self._choices, self._gatherer = self._choices_for(layers, place), gatherer
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
        self._gatherer.begin(self._choices.has_sum(self.steps))
        self._now = self._choices.choose(self.steps, self._last, self.replay.get(number))
        self._plans.update(self._now.plans)
        if self.log is not None:
            self.log.write(number, self._plans, self._now.trial is not None)
        begin = self._clock()
        try:
            yield
            self._now.seconds = self._clock() - begin if self.steps >= _SKIPPED else None
            news = self._gatherer.end(None if self._last is None else self._last.seconds)
            if news is not None:
                self._choices.learn(news, self._last)
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
    def layers(self) -> dict[str, TunedLayer]:  # noqa: D102 - above
        return self._choices.layers

    @property
    def dictionary(self) -> Dictionary:  # noqa: D102 - above
        return self._choices.dictionary

    @property
    def trials(self) -> int:  # noqa: D102 - above
        return self._choices.trials

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

    def predict_with(self, cost: CostFunction, machine: Mapping[str, Any]) -> None:
        """Predict as for another machine, after `attach` and before the first step; nothing is known then.

        Args:
            cost: as of the tuner.
            machine: facts in place of those that `attach` was given.
        """
        self._cost = cost
        self._choices = self._choices_for(self.layers, {**self.dictionary.place, **machine})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, as plain data (JSON)."""
        if self.log is not None:
            self.log.flush()
        known = {n: [list(s.counts), s.capacity, s.tokens] for n, s in self._choices.known.items()}
        return {
            "dictionary": self.dictionary.to_dict(),
            "known": known,
            "steps": self.steps,
            "trials": self.trials,
            "calm": self._choices.calm,
            "plans": {name: plan.to_dict() for name, plan in self._plans.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; what is damaged or of another place is left out, and logged.

        Call it after `attach`, on every rank with the same state. Deterministic plans are then those of the
        state alone: what other runs have learnt since would change them.
        """
        try:
            found = Dictionary.from_dict(state.get("dictionary"), self.settings.limits)
            self.dictionary.check_place(found)
        except ConfigError as error:
            _log.info("the tuner begins anew: %s", error)
            return
        if self.settings.deterministic:
            self.dictionary.entries.clear()
        self.dictionary.merge(found)
        if state["known"].keys() != self.layers.keys():
            return
        known = {name: Seen(tuple(c), cap, t) for name, (c, cap, t) in state["known"].items()}
        self._choices.known = known
        self._plans = {name: ExecutionPlan.from_dict(plan) for name, plan in state["plans"].items()}
        self.steps, self._choices.trials = int(state["steps"]), int(state["trials"])
        self._choices.calm = int(state.get("calm", 0))

    def _choices_for(self, layers: Mapping[str, TunedLayer], place: Mapping[str, Any]) -> Choices:
        dictionary = Dictionary(place, self.settings.rows_per_bucket)
        return Choices(layers, dictionary, self._cost, self.settings)
