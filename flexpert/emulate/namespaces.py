"""Network namespaces without names: each lives as long as a descriptor or a process of it, and no longer.

Nothing of ours is ever listed under /run/netns, so that nothing stays behind, not even after SIGKILL: with
the last descriptor the kernel removes a namespace, its devices, addresses and queues.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
TUN = "/dev/net/tun"
COMMAND_SECONDS = 60

try:
    _libc: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True)
except (OSError, TypeError):  # not a Unix
    _libc = None


class NamespaceError(Exception):
    """Why a namespace or device cannot be had, in one line."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace by its descriptor, and that of the user namespace which owns it, if not ours."""

    net: int
    user: int | None = None
    tap: int | None = None

    def enter(self) -> None:
        """Move the calling process, which must have one thread if there is a user namespace to enter."""
        if self.user is not None:
            _call("setns", self.user, CLONE_NEWUSER)
        _call("setns", self.net, CLONE_NEWNET)

    def run(self, command: Sequence[str], text: str = "", pass_fds: Iterable[int] = ()) -> str:
        """The output of a command run inside.

        Raises:
            NamespaceError: it is missing, fails, or takes a minute.
        """
        try:
            with quiet_fork():
                done = subprocess.run(
                    command,
                    input=text,
                    capture_output=True,
                    text=True,
                    timeout=COMMAND_SECONDS,
                    check=False,
                    pass_fds=tuple(pass_fds),
                    preexec_fn=self.enter,  # one or two system calls
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise NamespaceError(f"{command[0]}: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise NamespaceError(f"{' '.join(command)}: {lines[0]}")
        return done.stdout

    def processes(self) -> list[int]:
        """The processes that run inside, except the caller's."""
        inode, found = os.fstat(self.net).st_ino, []
        for folder in Path("/proc").iterdir():
            # One that ends meanwhile, or of another user: not ours.
            with suppress(OSError, ValueError):
                if (folder / "ns/net").stat().st_ino == inode:
                    found.append(int(folder.name))
        return [pid for pid in found if pid != os.getpid()]

    def kill_processes(self) -> None:
        """End what ranks left behind, also in a session of its own."""
        for pid in self.processes():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def create(count: int, *, user: bool, taps: int = 0) -> list[Namespace]:
    """Namespaces, the first `taps` of them with a TAP device `eth0`.

    Args:
        count: how many.
        user: inside a new user namespace, as processes without rights may do on many systems.
        taps: how many have a TAP.

    Raises:
        NamespaceError: the kernel refuses.
    """
    if _libc is None or not Path("/proc/self/ns/net").exists():
        raise NamespaceError("network namespaces exist on Linux only")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        # No handler of ours may run in the child: it would unwind into our caller.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            with quiet_fork():
                pid = os.fork()
            if pid == 0:
                ours.close()
                _serve(theirs, count, user, taps)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        try:
            return _receive(ours, count)
        finally:
            ours.close()
            os.waitpid(pid, 0)


def close(namespaces: Iterable[Namespace]) -> None:
    """Let go of them: the kernel removes those in which no process is left."""
    members = [(space.net, space.tap, space.user) for space in namespaces]
    for descriptor in {number for numbers in members for number in numbers if number is not None}:
        os.close(descriptor)


@contextmanager
def quiet_fork() -> Iterator[None]:
    """Forks without the warning of Python 3.12 and later about other threads of this process.

    The child takes no lock that they could hold: it makes system calls, or runs what the caller wants forked.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield


def _receive(channel: socket.socket, count: int) -> list[Namespace]:
    made: list[Namespace] = []
    owner: int | None = None
    while len(made) < count:
        message, descriptors, _, _ = socket.recv_fds(channel, 4096, 3)
        if message == b"user":
            owner = descriptors[0]
        elif message == b"node":
            made.append(Namespace(descriptors[0], owner, descriptors[1] if len(descriptors) > 1 else None))
        else:
            close([*made, *([] if owner is None else [Namespace(owner)])])
            raise NamespaceError(message.decode() or "the process that makes namespaces ended")
    return made


def _serve(channel: socket.socket, count: int, user: bool, taps: int) -> None:
    """In the child: make them and send their descriptors; never returns."""
    step = "namespaces"
    try:
        if user:
            step = "a user namespace"
            _unshare_user()
            _send(channel, b"user", ["/proc/self/ns/user"])
        for index in range(count):
            step = "a network namespace"
            _call("unshare", CLONE_NEWNET)
            _configure()
            tap: list[int] = []
            if index < taps:
                step = f"a TAP device ({TUN})"
                tap = [open_tap("eth0")]
            _send(channel, b"node", ["/proc/self/ns/net"], tap)
    except OSError as error:
        with suppress(OSError):
            channel.send(f"{step}: {error.strerror or error}".encode())
    except BaseException as error:  # noqa: BLE001 (nothing may leave the child)
        with suppress(OSError):
            channel.send(f"{step}: {error!r}".encode())
    finally:
        os._exit(0)


def _send(channel: socket.socket, word: bytes, paths: Sequence[str], more: Sequence[int] = ()) -> None:
    opened = [os.open(path, os.O_RDONLY) for path in paths]
    socket.send_fds(channel, [word], [*opened, *more])
    for descriptor in (*opened, *more):
        os.close(descriptor)


def _unshare_user() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_bytes(b"deny")
    Path("/proc/self/uid_map").write_bytes(b"0 %d 1" % uid)
    Path("/proc/self/gid_map").write_bytes(b"0 %d 1" % gid)


def _configure() -> None:
    # A link without loss and with one long queue: Reno fills it. BBR, the default on some systems, would
    # probe for its rate instead.
    with suppress(OSError):
        Path("/proc/sys/net/ipv4/tcp_congestion_control").write_bytes(b"reno")


def open_tap(name: str) -> int:
    """The descriptor of a new TAP device in the caller's namespace; the device goes with it."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_WITHOUT_HEADER))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _call(name: str, *arguments: int) -> None:
    assert _libc is not None
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")
