"""What is decided in each step: the plans that run, the one that is tried, and what its time has told.

All of it is a function of sums over the ranks, so that all ranks decide alike. Only one bucket tries a plan
at a time, while all others keep theirs, so that the time of a step tells of one choice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from .bucket import Bucket
from .dictionary import Dictionary, Key
from .gather import News, Seen
from .log import Plans
from .propose import CostFunction, TunedLayer, propose
from .settings import TunerSettings

_CALM, _SELDOM = 8, 4  # after so many sums that brought nothing new only every so many steps has one


@dataclass
class Step:
    """A step under way, or just over.

    Attributes:
        plans: of each layer.
        keys: shape and bucket of each layer.
        trial: the key whose plan is tried; None: none is.
        replayed: the plans are those of a log.
        seconds: that it took; None: not known.
    """

    plans: Plans
    keys: dict[str, Key]
    trial: Key | None = None
    replayed: bool = False
    seconds: float | None = None

    def context(self, key: Key) -> int:
        """A number for the plans of all other layers: a plan's time is compared beside the same ones."""
        others = [
            f"{name} {plan.encode()}" for name, plan in sorted(self.plans.items()) if self.keys[name] != key
        ]
        return zlib.crc32("\n".join(others).encode())


class Choices:
    """What is known of the layers of a model, and what follows for the next step.

    Args:
        layers: those that are tuned, by name.
        dictionary: of what is known of plans.
        cost: predicts the seconds of a call.
        settings: how.

    Attributes:
        layers, dictionary: as given.
        known: what the last sums told of each layer's rows.
        trials: steps that tried a plan.
        calm: sums in a row that brought nothing new.
    """

    def __init__(
        self,
        layers: Mapping[str, TunedLayer],
        dictionary: Dictionary,
        cost: CostFunction,
        settings: TunerSettings,
    ) -> None:
        self.layers, self.dictionary = dict(layers), dictionary
        self._cost, self._settings = cost, settings
        self.known: dict[str, Seen] = {}
        self.trials = self.calm = 0

    def has_sum(self, steps: int) -> bool:
        """Whether the ranks tell each other anything in the step after so many."""
        return self.calm < _CALM or steps % _SELDOM == 0

    def choose(self, steps: int, last: Step | None, replay: Plans | None) -> Step:
        """The plans of a step, from what is known before it.

        Args:
            steps: that ran before.
            last: the step before; None: unknown.
            replay: plans to repeat, whatever is known.
        """
        keys, entries = self._keys(), self.dictionary.entries
        for name, key in keys.items():
            if key not in entries:
                entries[key] = propose(
                    self.layers[name],
                    self.known[name],
                    key,
                    self.dictionary,
                    self._cost,
                    self._settings.limits,
                )
        if replay is not None:
            return Step({n: plan for n, plan in replay.items() if n in self.layers}, keys, replayed=True)
        step = Step({name: entries[key].plan for name, key in keys.items()}, keys)
        waits = last is not None and last.trial is not None  # for the time of that trial
        may = self.trials + 1 <= self._settings.burst + self._settings.share * steps
        if may and not waits and not self._settings.deterministic:
            self._try(step)
        return step

    def learn(self, news: News, last: Step | None) -> None:
        """Take in a sum: the workload of the step that ends, the time of the one before, `last`."""
        before = self._keys()
        self.known.update(news.layers)
        if news.seconds is not None and last is not None:
            self._measure(news.seconds, last)
        keys = self._keys()
        self.calm = self.calm + 1 if keys == before and all(map(self._done, keys.values())) else 0

    def _try(self, step: Step) -> None:
        """Let one bucket try a plan, if any wants to: the one whose layers are predicted to take longest."""
        entries, wanted = self.dictionary.entries, {}
        keys = list(step.keys.values())
        for key in dict.fromkeys(keys):
            entries[key].spare(self.dictionary.lost_kernels(*key))
            plan = entries[key].next(step.context(key))
            if plan is not None:
                wanted[key] = keys.count(key) * entries[key].predicted, plan
        if wanted:
            step.trial = max(wanted, key=lambda key: wanted[key][0])
            self.trials += 1
            plan = wanted[step.trial][1]
            step.plans.update({name: plan for name, key in step.keys.items() if key == step.trial})

    def _measure(self, seconds: float, last: Step) -> None:
        """Note the time of a step for the plan that was tried in it, or else for all plans."""
        if last.replayed or self._settings.deterministic:
            return
        for key in [last.trial] if last.trial is not None else list(dict.fromkeys(last.keys.values())):
            plan = next(last.plans[name] for name, k in last.keys.items() if k == key)
            entry = self.dictionary.entries[key]
            if key == last.trial or plan == entry.plan:  # else a former leader
                entry.record(plan, seconds, last.context(key), self._settings.band)

    def _done(self, key: Key) -> bool:
        entry = self.dictionary.entries.get(key)
        return self._settings.deterministic or (entry is not None and entry.settled and not entry.uneasy)

    def _keys(self) -> dict[str, Key]:
        """Shape and bucket of each layer, as far as known."""
        found = {}
        for name, seen in self.known.items():
            shape = self.layers[name].shape
            bucket = Bucket.of(seen.counts, shape.world, seen.capacity, self._settings.rows_per_bucket)
            found[name] = shape, bucket
        return found
