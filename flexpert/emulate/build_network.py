"""From a cluster and a mode to its network."""

from __future__ import annotations

from flexpert.core.errors import ConfigError

from . import namespaces
from .kernel_links import KernelLinks
from .network import LoopbackNetwork, Network
from .probe import Choice, Facilities, choose, probe
from .spec import ClusterSpec
from .switch import SwitchNetwork


def build_network(spec: ClusterSpec, mode: str = "auto") -> tuple[Network, Choice]:
    """The network, up, and the choice it comes from.

    Raises:
        ConfigError: the mode is unknown, or not possible here.
    """
    if mode == "loopback":
        return LoopbackNetwork(spec), choose(mode, spec, Facilities())
    found = probe()
    choice = choose(mode, spec, found)
    if choice.mode == "loopback":
        return LoopbackNetwork(spec), choice
    switched = choice.mode == "switch"
    spaces = []
    try:
        spaces = namespaces.create(
            spec.nodes + (0 if switched else 1), user=found.user, taps=spec.nodes if switched else 0
        )
        if switched:
            return SwitchNetwork(spec, spaces), choice
        return KernelLinks(spec, spaces, delay=choice.mode == "shape"), choice
    except BaseException as error:
        namespaces.close(spaces)
        if isinstance(error, namespaces.NamespaceError):
            raise ConfigError(f"mode={choice.mode!r} cannot be set up: {error}") from error
        raise
