"""A cluster: nodes, devices, the links and rates of its machine, and what is slower than the rest.

name: lab
nodes: 8
devices: 4                     # of each node
machine: a100-ndv4             # a preset, the file of a calibration, or its content
unlike:
- {node: 3, link: 0.5}       # half the bandwidth between the nodes
- {rank: 9, compute: 0.8, memory: 0.5}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpert.core.config import require_int, require_number
from flexpert.core.errors import ConfigError
from flexpert.core.registry import suggest
from flexpert.tune import Machine
from flexpert.tune.presets import DEVICES, preset

from .describe import check_fields, split_file, split_text

MAX_RANKS = 65_536


@dataclass(frozen=True, kw_only=True)
class Unlike:
    """A node or a rank that is not as fast, or has not as much memory, as the others.

    Attributes:
        node: which node; None where a rank is meant.
        rank: which rank; None where a node is meant.
        compute: speed of its products and copies, as a share of the usual one.
        link: bandwidth of its link to other nodes, as a share of the usual one; of nodes.
        memory: of its devices, as a share of the usual one.
    """

    node: int | None = None
    rank: int | None = None
    compute: float = 1.0
    link: float = 1.0
    memory: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equally many devices; each device is one rank.

    Attributes:
        name: of it.
        nodes, devices: nodes, and devices of each.
        machine: rates, links and memory; see `flexpert.tune.Machine`.
        unlike: nodes and ranks that are not as fast, or as large, as the others.

    Raises:
        ConfigError: a value that cannot be; the message names the field.
    """

    name: str
    nodes: int
    devices: int
    machine: Machine
    unlike: tuple[Unlike, ...] = ()

    def __post_init__(self) -> None:
        require_int("cluster: nodes", self.nodes, least=1)
        require_int("cluster: devices", self.devices, least=1)
        if self.ranks > MAX_RANKS:
            raise ConfigError(
                f"cluster: nodes={self.nodes} of devices={self.devices} are {self.ranks} ranks; at most "
                f"{MAX_RANKS} are simulated"
            )
        for place, entry in enumerate(self.unlike):
            self._check(f"cluster: unlike[{place}]", entry)

    def _check(self, where: str, entry: Unlike) -> None:
        if (entry.node is None) == (entry.rank is None):
            raise ConfigError(f"{where}: node={entry.node!r}, rank={entry.rank!r}; expected one of the two")
        for name, value, count in (("node", entry.node, self.nodes), ("rank", entry.rank, self.ranks)):
            valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
            if value is not None and not valid:
                raise ConfigError(f"{where}: {name}={value!r}, expected an integer in 0..{count - 1}")
        require_number(f"{where}: compute", entry.compute, above=0)
        require_number(f"{where}: link", entry.link, above=0)
        require_number(f"{where}: memory", entry.memory, above=0)
        if entry.rank is not None and entry.link != 1.0:
            raise ConfigError(f"{where}: link={entry.link!r} of a rank; links are of nodes, set node")

    @property
    def ranks(self) -> int:
        """W: all devices."""
        return self.nodes * self.devices

    @cached_property
    def node_W(self) -> Tensor:
        """int64: the node of each rank."""
        return torch.arange(self.ranks) // self.devices

    @cached_property
    def compute_W(self) -> Tensor:
        """float64: speed of each rank, 1 as usual."""
        speed_W = torch.ones(self.ranks, dtype=torch.float64)
        for entry in self.unlike:
            which = (
                self.node_W == entry.node if entry.rank is None else torch.arange(self.ranks) == entry.rank
            )
            speed_W[which] *= entry.compute
        return speed_W

    @cached_property
    def link_N(self) -> Tensor:
        """float64: bandwidth of each node's link, 1 as usual."""
        speed_N = torch.ones(self.nodes, dtype=torch.float64)
        for entry in self.unlike:
            if entry.node is not None:
                speed_N[entry.node] *= entry.link
        return speed_N

    @property
    def memory(self) -> int:
        """Bytes of the device with least; 0: unknown. All ranks hold equally much, so that one must fit."""
        return int(self.machine.memory * min([1.0, *(entry.memory for entry in self.unlike)]))

    def with_machine(self, **changes: Any) -> Cluster:
        """The same cluster of another machine: fields of `Machine` in place of its own."""
        return dataclasses.replace(self, machine=dataclasses.replace(self.machine, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is its inverse."""
        return {
            "name": self.name,
            "nodes": self.nodes,
            "devices": self.devices,
            "machine": self.machine.to_dict(),
            "unlike": [
                {key: value for key, value in dataclasses.asdict(entry).items() if value is not None}
                for entry in self.unlike
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """A cluster of plain data.

        Raises:
            ConfigError: an unknown, missing or bad field; the message names it.
        """
        data = {"name": "cluster", **data}
        check_fields("cluster", cls, data)
        entries = data.get("unlike", ())
        if not isinstance(entries, (list, tuple)):
            raise ConfigError(f"cluster: unlike={entries!r}, expected a list of mappings")
        for place, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise ConfigError(f"cluster: unlike[{place}]={entry!r}, expected a mapping")
            check_fields(f"cluster: unlike[{place}]", Unlike, entry)
        data["unlike"] = tuple(Unlike(**entry) for entry in entries)
        data["machine"] = _machine(data["machine"])
        return cls(**data)

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """The cluster of a text: `a100-ndv4:nodes=8`, `a100-ndv4:nodes=8,slow_link=3@0.5`, `lab.yaml`.

        Settings are nodes, devices, slow_node=NODE@SPEED, slow_rank=RANK@SPEED and slow_link=NODE@SPEED, a
        speed of 0.5 being half the usual.

        Raises:
            ConfigError: an unknown name or field, or a bad value.
        """
        found = split_file(text, "cluster")
        if found is None:
            name, settings = split_text(text, "cluster")
            if name not in DEVICES:
                raise ConfigError(
                    f"cluster: unknown preset {name!r}: {suggest(name, DEVICES)}; or a file's name"
                )
            data: dict[str, Any] = {"name": name, "nodes": 1, "devices": DEVICES[name], "machine": name}
        else:
            data, settings = found
        given, slow = data.get("unlike", []), []
        for key, (place, speed) in {
            "slow_node": ("node", "compute"),
            "slow_rank": ("rank", "compute"),
            "slow_link": ("node", "link"),
        }.items():
            if key in settings:
                slow.append(_slow(key, settings.pop(key), place, speed))
        if slow and isinstance(given, (list, tuple)):
            given = [*given, *slow]
        return cls.from_dict({**data, **settings, "unlike": given})


def _slow(key: str, value: Any, place: str, speed: str) -> dict[str, Any]:
    which, _, share = str(value).partition("@")
    try:
        return {place: int(which), speed: float(share)}
    except ValueError:
        raise ConfigError(
            f"cluster: {key}={value!r}, expected {place.upper()}@SPEED, such as {key}=3@0.5"
        ) from None


def _machine(value: Any) -> Machine:
    if isinstance(value, Machine):
        return value
    if isinstance(value, Mapping):
        return Machine.from_dict(value)
    if not isinstance(value, str):
        raise ConfigError(f"cluster: machine={value!r}, expected a preset's name, a file or a mapping")
    if value in DEVICES:
        return preset(value)
    if not Path(value).exists():
        raise ConfigError(f"cluster: machine={value!r} is no file and no preset: {suggest(value, DEVICES)}")
    try:
        return Machine.from_json(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster: machine={value!r} is not the file of a calibration: {error}") from error
