"""What was learnt about plans, as a file: from (layer shape, bucket) to a search and its winner.

The file is JSON to be read by people too. It is written under a lock, merged with what others wrote in the
meantime, and put in place by a rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError, FlexpertError
from flexpert.core.plan import ExecutionPlan

from .bucket import Bucket
from .cost import check
from .entry import Entry
from .limits import Limits
from .workload import LayerShape

FORMAT, VERSION = "flexpert tuner", 1
Key = tuple[LayerShape, Bucket]


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

    def nearest(self, shape: LayerShape, bucket: Bucket) -> list[Entry]:
        """The two most similar buckets of those whose search among plans is over."""
        known = [
            (bucket.distance(b), b, e)
            for (s, b), e in self.entries.items()
            if s == shape and e.search.settled
        ]
        return [entry for _, _, entry in sorted(known, key=lambda k: k[:2])[:2]]

    def lost_kernels(self, shape: LayerShape, bucket: Bucket) -> set[str]:
        """Those that brought nothing in buckets with up to twice or half as many rows."""
        alike = (e for (s, b), e in self.entries.items() if s == shape and bucket.within_twice(b))
        return {kernel for entry in alike for kernel in entry.lost()}

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
                shape, bucket = LayerShape.from_dict(item["shape"]), Bucket.from_dict(item["bucket"])
                entry = Entry.from_dict(item, shape, limits)
                plans = [candidate.plan for candidate in entry.search.candidates]
                for plan in [*plans, *(ExecutionPlan(kernel=kernel) for kernel in entry.kernels)]:
                    check(shape, plan)
                result.entries[shape, bucket] = entry
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError, FlexpertError) as error:
            raise ConfigError(f"it is damaged ({type(error).__name__}: {error})") from error
        return result

    @classmethod
    def read(cls, path: Path, limits: Limits | None = None) -> Dictionary:
        """The dictionary in a file.

        Raises:
            ConfigError: no such file, or not a whole dictionary; the message names it.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: it is no JSON ({error})") from error
        try:
            return cls.from_dict(data, limits)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def take(self, path: Path, limits: Limits | None = None) -> None:
        """Merge what a file knows about this place; a damaged or foreign one gives a warning, no more."""
        try:
            found = Dictionary.read(path, limits)
            self.check_place(found)
        except ConfigError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return
            text = str(error) if str(path) in str(error) else f"{path}: {error}"
            warnings.warn(f"the tuner's dictionary is not used and will be rebuilt: {text}", stacklevel=2)
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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _text(shape: LayerShape) -> str:
    return json.dumps(shape.to_dict(), sort_keys=True)
