"""What was learnt about plans, as a file: from (layer shape, bucket) to a search and its winner.

The file is JSON to be read by people too. It is written under a lock, merged with what others wrote in the
meantime, and put in place by a rename.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError, FlexpertError
from flexpert.core.plan import ExecutionPlan

from .bucket import Bucket
from .race import Race
from .search import Candidate, Limits, Search
from .workload import LayerShape

FORMAT, VERSION = "flexpert tuner", 1
Key = tuple[LayerShape, Bucket]


def search_for(shape: LayerShape) -> type[Search]:
    """How the plans of a layer are searched: on one rank they are few, and differ little."""
    return Race if shape.world == 1 else Search


@dataclass
class Entry:
    """One search and what became of it.

    Attributes:
        search: with its measurements.
        retuned: how often the winner's time left its band and the search began anew.
        updated: when it last changed, seconds since 1970.
    """

    search: Search
    retuned: int = 0
    updated: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it for a reader: winner, medians and the reason."""
        search = self.search
        times: dict[int, list[float]] = {}
        for sample in search.samples:
            times.setdefault(sample.candidate, []).append(sample.seconds)
        return {
            "winner": search.plan.to_dict(),
            "settled": search.settled,
            "why": search.why(),
            "retuned": self.retuned,
            "updated": self.updated,
            "candidates": [
                {"plan": c.plan.to_dict(), "predicted": c.predicted, "seconds": times.get(i, [])}
                for i, c in enumerate(search.candidates)
            ],
            "hints": [plan.to_dict() for plan in search.hints],
            "samples": [[s.candidate, s.seconds, s.context] for s in search.samples],
        }

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], limits: Limits | None = None, kind: type[Search] = Search
    ) -> Entry:
        """An entry from plain data; only what cannot be derived is read."""
        found = [
            Candidate(ExecutionPlan.from_dict(c["plan"]), _number(c["predicted"])) for c in data["candidates"]
        ]
        hints = [ExecutionPlan.from_dict(plan) for plan in data["hints"]]
        search = kind(found, limits, hints, first=found[0].plan)
        for place, seconds, context in data["samples"]:
            if not 0 <= place < len(found):
                raise ConfigError(f"a sample of candidate {place!r} of {len(found)}")
            search.record(found[place].plan, _number(seconds), int(context))
        return cls(search, int(data["retuned"]), _number(data["updated"]))

    def rank(self) -> tuple[bool, float, int, str]:
        """Of two entries for one key the greater is kept: settled before not, then the newer one."""
        return self.search.settled, self.updated, len(self.search.samples), json.dumps(self.to_dict())


class Dictionary:
    """Entries by (layer shape, bucket), all of one place.

    Args:
        place: facts about ranks and machine; knowledge of another place is worth nothing here.
        rows_per_bucket: R, which buckets count in.

    Attributes:
        entries: as said.
    """

    def __init__(self, place: Mapping[str, Any], rows_per_bucket: int) -> None:
        self.place = json.loads(json.dumps(dict(place)))
        self.rows_per_bucket = rows_per_bucket
        self.entries: dict[Key, Entry] = {}

    def merge(self, other: Dictionary) -> None:
        """Take the entries of another dictionary that this one has not, or has in a lesser state."""
        for key, entry in other.entries.items():
            own = self.entries.get(key)
            if own is None or own.rank() < entry.rank():
                self.entries[key] = entry

    def nearest(self, shape: LayerShape, bucket: Bucket) -> list[Search]:
        """The searches of the two most similar buckets, of those that are over."""
        known = [
            (bucket.distance(b), b, e.search)
            for (s, b), e in self.entries.items()
            if s == shape and e.search.settled
        ]
        return [search for _, _, search in sorted(known, key=lambda k: k[:2])[:2]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        entries = sorted(self.entries.items(), key=lambda item: (_text(item[0][0]), item[0][1]))
        return {
            "format": FORMAT,
            "version": VERSION,
            "place": self.place,
            "rows_per_bucket": self.rows_per_bucket,
            "entries": [
                {
                    "shape": shape.to_dict(),
                    "bucket": bucket.to_dict(),
                    "meaning": bucket.describe(self.rows_per_bucket),
                    **entry.to_dict(),
                }
                for (shape, bucket), entry in entries
            ],
        }

    @classmethod
    def from_dict(cls, data: Any, limits: Limits | None = None) -> Dictionary:
        """A dictionary from plain data.

        Raises:
            ConfigError: it is none, of another version, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ConfigError("it is no dictionary of the tuner")
        if data.get("version") != VERSION:
            raise ConfigError(f"it has version {data.get('version')!r}, this program reads {VERSION}")
        try:
            result = cls(data["place"], int(data["rows_per_bucket"]))
            for item in data["entries"]:
                key = LayerShape.from_dict(item["shape"]), Bucket.from_dict(item["bucket"])
                result.entries[key] = Entry.from_dict(item, limits, search_for(key[0]))
        except (LookupError, TypeError, ValueError, FlexpertError) as error:
            raise ConfigError(f"it is damaged ({type(error).__name__}: {error})") from error
        return result

    @classmethod
    def read(cls, path: Path, limits: Limits | None = None) -> Dictionary:
        """The dictionary in a file.

        Raises:
            ConfigError: no such file, or not a whole dictionary; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), limits)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: it is no JSON ({error})") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def take(self, path: Path, limits: Limits | None = None) -> None:
        """Merge what a file knows about this place; a damaged or foreign one gives a warning, no more."""
        if not Path(path).exists():
            return
        try:
            found = Dictionary.read(path, limits)
            self.check_place(found)
        except ConfigError as error:
            warnings.warn(f"the tuner's dictionary is not used and will be rebuilt: {error}", stacklevel=2)
            return
        self.merge(found)

    def check_place(self, other: Dictionary) -> None:
        """Refuse the dictionary of another place.

        Raises:
            ConfigError: which fact differs.
        """
        if other.rows_per_bucket != self.rows_per_bucket:
            raise ConfigError(f"its buckets are of {other.rows_per_bucket} rows, not {self.rows_per_bucket}")
        for name in sorted({*self.place, *other.place}):
            if self.place.get(name) != other.place.get(name):
                raise ConfigError(
                    f"it is of another place: {name} {other.place.get(name)!r}, not {self.place.get(name)!r}"
                )

    def save(self, path: Path) -> None:
        """Merge this dictionary into a file, which other processes may be writing too.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                merged = Dictionary(self.place, self.rows_per_bucket)
                merged.take(path)
                merged.merge(self)
                fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                fresh.write_text(json.dumps(merged.to_dict(), indent=1) + "\n", encoding="utf-8")
                fresh.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error

    def touch(self, entry: Entry) -> None:
        """Note that an entry changed now."""
        entry.updated = round(time.time(), 3)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ConfigError(f"{value!r} is not finite")
    return float(value)


def _text(shape: LayerShape) -> str:
    return json.dumps(shape.to_dict(), sort_keys=True)
