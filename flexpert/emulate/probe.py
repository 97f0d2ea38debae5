"""What this machine and user can emulate, found by trying it, and the mode that follows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from flexpert.core.errors import ConfigError

from . import namespaces, program
from .namespaces import Namespace, NamespaceError
from .spec import ClusterSpec

MODES = ("shape", "switch", "bandwidth", "loopback")  # what follows "auto"


@dataclass(frozen=True, kw_only=True)
class Facilities:
    """For each facility why it cannot be had; "" where it works.

    Attributes:
        user: whether namespaces need a user namespace around them: no rights, but the kernel lets anybody.
        namespaces: network namespaces.
        veth: pairs of virtual Ethernet devices on a bridge, by the commands of iproute2.
        tbf: the token bucket of `tc`.
        netem: the delay queue of `tc`.
        tap: TAP devices, by /dev/net/tun.
        compiler: a C++ compiler for the switch, or the switch compiled before.
    """

    user: bool = False
    namespaces: str = ""
    veth: str = ""
    tbf: str = ""
    netem: str = ""
    tap: str = ""
    compiler: str = ""

    def why_not(self, mode: str, spec: ClusterSpec) -> str:
        """Why the cluster cannot have links of that mode, "" if it can."""
        needed = {
            "shape": (self.namespaces, self.veth, self.netem),
            "switch": (self.namespaces, self.veth, self.tap, self.compiler),
            "bandwidth": (self.namespaces, self.veth, self.tbf if spec.limits_rate else ""),
            "loopback": (),
        }[mode]
        return next((reason for reason in needed if reason), "")


@dataclass(frozen=True)
class Choice:
    """The mode, and what of the cluster it does not emulate and why, "" if it does all."""

    mode: str
    missing: str = ""


def choose(mode: str, spec: ClusterSpec, found: Facilities) -> Choice:
    """The mode asked for; with "auto" the cheapest that does all that is asked, else the one that does most.

    Raises:
        ConfigError: the mode is unknown, or not possible here.
    """
    if mode not in ("auto", *MODES):
        raise ConfigError(f"mode={mode!r} is unknown; choose one of: auto, {', '.join(MODES)}")
    reasons = {name: found.why_not(name, spec) for name in MODES}
    if mode != "auto":
        if reasons[mode]:
            raise ConfigError(
                f"mode={mode!r} is not possible here: {reasons[mode]}; mode='auto' takes what is possible"
            )
        return Choice(mode, _missing(mode, spec, {}))
    # Without latency the kernel's token bucket does all, and costs less than a switch.
    order = MODES if spec.has_latency else ("bandwidth", "switch", "shape", "loopback")
    chosen = next(name for name in order if not reasons[name])
    return Choice(chosen, _missing(chosen, spec, {name: why for name, why in reasons.items() if why}))


def _missing(mode: str, spec: ClusterSpec, reasons: dict[str, str]) -> str:
    if mode == "bandwidth" and spec.has_latency:
        text = "latency is not emulated, only bandwidth"
    elif mode == "loopback":
        text = "all ranks share one loopback: no bandwidth, no latency, no cutting of nodes"
    else:
        return ""
    modes = {why: [name for name in reasons if reasons[name] == why] for why in reasons.values()}
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in modes.items())
    return f"{text} ({why or f'mode={mode!r} was asked for'})"


def probe() -> Facilities:
    """Try each facility; some hundredths of a second."""
    try:
        spaces, user = _namespaces()
    except NamespaceError as error:
        return Facilities(namespaces=str(error))
    try:
        space = spaces[0]
        return Facilities(
            user=user,
            veth=_veth(space),
            tbf=_try(
                space, "tc qdisc add dev lo root tbf rate 1mbit burst 100k limit 1m", "the token bucket (tbf)"
            ),
            netem=_try(space, "tc qdisc replace dev lo root netem delay 1ms", "the delay queue (netem)"),
            tap=_tap(user),
            compiler=program.why_not(),
        )
    finally:
        namespaces.close(spaces)


def _namespaces() -> tuple[list[Namespace], bool]:
    """One namespace, by own rights or in a user namespace."""
    try:
        return namespaces.create(1, user=False), False
    except NamespaceError as error:
        first = error
    try:
        return namespaces.create(1, user=True), True
    except NamespaceError as error:
        who = "root" if os.geteuid() == 0 else "this user"
        raise NamespaceError(
            f"{who} may make neither network namespaces ({first}) nor a user namespace ({error})"
        ) from error


def _veth(space: Namespace) -> str:
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"no command {' and '.join(missing)}: install iproute2"
    commands = "link add br0 type bridge\nlink add p0 type veth peer name p1\nlink set p0 master br0\n"
    return _try(space, "ip -batch -", "virtual Ethernet on a bridge", commands)


def _tap(user: bool) -> str:
    try:
        namespaces.close(namespaces.create(1, user=user, taps=1))
    except NamespaceError as error:
        return str(error)
    return ""


def _try(space: Namespace, command: str, name: str, text: str = "") -> str:
    words: Sequence[str] = command.split()
    if shutil.which(words[0]) is None:
        return f"no command {words[0]}: install iproute2"
    try:
        space.run(words, text)
    except NamespaceError as error:
        return f"the kernel has not {name} ({str(error).partition(': ')[2] or error})"
    return ""
