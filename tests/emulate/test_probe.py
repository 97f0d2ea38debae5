"""The choice of a mode, with machines made up; and that probing tells the truth about this one."""

from __future__ import annotations

import pytest

from flexpert.core.errors import ConfigError
from flexpert.emulate import namespaces, probe, program
from flexpert.emulate.namespaces import Namespace, NamespaceError
from flexpert.emulate.probe import Facilities, choose
from flexpert.emulate.spec import ClusterSpec
from flexpert.ops.cpu.build import BuildError

PLAIN = ClusterSpec.parse(2, 1)
RATED = ClusterSpec.parse(2, 1, "200mbit")
DELAYED = ClusterSpec.parse(2, 1, "200mbit", "500us")


@pytest.mark.parametrize(
    ("lacking", "spec", "mode"),
    [
        ((), DELAYED, "shape"),
        (("netem",), DELAYED, "switch"),
        (("netem", "tap"), DELAYED, "bandwidth"),
        (("netem", "compiler"), DELAYED, "bandwidth"),
        (("netem", "tap", "tbf"), DELAYED, "loopback"),
        (("veth",), DELAYED, "loopback"),
        (("namespaces",), DELAYED, "loopback"),
        ((), RATED, "bandwidth"),
        (("tbf",), RATED, "switch"),
        (("tbf", "tap"), RATED, "shape"),
        (("tbf", "tap", "netem"), RATED, "loopback"),
        (("tbf", "netem", "tap"), PLAIN, "bandwidth"),
        (("namespaces",), PLAIN, "loopback"),
    ],
)
def test_auto_takes_the_cheapest_mode_that_does_what_is_asked(
    lacking: tuple[str, ...], spec: ClusterSpec, mode: str
) -> None:
    choice = choose("auto", spec, Facilities(**{name: f"no {name} here" for name in lacking}))
    assert choice.mode == mode
    complete = mode != "loopback" and not (mode == "bandwidth" and spec is DELAYED)
    assert (choice.missing == "") == complete
    if not complete:
        assert all(f"no {name} here" in choice.missing for name in lacking[:1])


def test_what_is_missing_is_told_once_with_each_reason() -> None:
    choice = choose("auto", DELAYED, Facilities(netem="no netem", tap="/dev/net/tun: Permission denied"))
    assert choice.missing == (
        "latency is not emulated, only bandwidth (shape: no netem; switch: /dev/net/tun: Permission denied)"
    )

    choice = choose("auto", DELAYED, Facilities(namespaces="not permitted"))
    assert choice.missing.endswith("no cutting of nodes (shape, switch, bandwidth: not permitted)")


def test_a_mode_asked_for_is_taken_or_refused_with_the_reason() -> None:
    assert choose("switch", RATED, Facilities(tbf="none", netem="none")).mode == "switch"
    assert "mode='bandwidth' was asked for" in choose("bandwidth", DELAYED, Facilities()).missing
    with pytest.raises(ConfigError, match="mode='shape' is not possible here: no netem; mode='auto'"):
        choose("shape", RATED, Facilities(netem="no netem"))
    with pytest.raises(ConfigError, match="mode='fast' is unknown; choose one of: auto, shape"):
        choose("fast", RATED, Facilities())


class FakeMachine:
    """Stands in for the kernel, the commands and the compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
        self.lacking, self.closed, self.made = lacking.split(), 0, 0
        monkeypatch.setattr(namespaces, "create", self.create)
        monkeypatch.setattr(namespaces, "close", self.close)
        monkeypatch.setattr(Namespace, "run", self.run)
        monkeypatch.setattr(
            probe.shutil, "which", lambda name: None if name in self.lacking else f"/bin/{name}"
        )
        monkeypatch.setattr(program, "find_compiler", self.find_compiler)
        monkeypatch.setattr(program, "cache_folder", lambda: program.SOURCE.parent / "no-cache")

    def create(self, count: int, *, user: bool, taps: int = 0) -> list[Namespace]:
        if "user" in self.lacking or (not user and "root" in self.lacking):
            raise NamespaceError("a user namespace: not permitted" if user else "a network namespace: EPERM")
        if taps and "tun" in self.lacking:
            raise NamespaceError("a TAP device (/dev/net/tun): Permission denied")
        self.made += 1
        return [Namespace(-1)]

    def close(self, spaces: list[Namespace]) -> None:
        self.closed += 1

    def run(self, command: list[str], text: str = "") -> str:
        words = [*command, *text.split()]
        for word in ("netem", "tbf", "bridge"):
            if word in words and word in self.lacking:
                raise NamespaceError(f"{command[0]}: Error: Specified kind is unknown.")
        return ""

    def find_compiler(self) -> list[str]:
        if "g++" in self.lacking:
            raise BuildError("no C++ compiler: install g++ or set CXX")
        return ["g++"]


@pytest.mark.parametrize(
    ("lacking", "field", "reason"),
    [
        ("netem", "netem", "has not the delay queue (netem) (Error: Specified kind is unknown.)"),
        ("tbf", "tbf", "has not the token bucket (tbf)"),
        ("bridge", "veth", "has not virtual Ethernet on a bridge"),
        ("ip", "veth", "no command ip: install iproute2"),
        ("ip tc", "veth", "no command ip and tc"),
        ("tc", "tbf", "no command tc"),
        ("tun", "tap", "/dev/net/tun): Permission denied"),
        ("g++", "compiler", "install g++"),
        (
            "root user",
            "namespaces",
            "neither network namespaces (a network namespace: EPERM) nor a user namespace",
        ),
    ],
)
def test_each_facility_is_tried(
    monkeypatch: pytest.MonkeyPatch, lacking: str, field: str, reason: str
) -> None:
    machine = FakeMachine(monkeypatch, lacking)
    facilities = probe.probe()
    assert reason in getattr(facilities, field)
    assert machine.made == machine.closed


def test_without_rights_a_user_namespace_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(monkeypatch, "root")
    assert probe.probe() == Facilities(user=True)
    FakeMachine(monkeypatch, "")
    assert probe.probe() == Facilities()


def test_probing_leaves_nothing_behind(nothing_left: None) -> None:
    assert probe.probe() == probe.probe()
