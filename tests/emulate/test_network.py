"""Links are as slow as they were asked to be, and can be cut, by sockets without any collective."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

from flexpert.core.errors import ConfigError, InputError
from flexpert.emulate import Cluster
from flexpert.emulate.switch import SwitchNetwork
from tests.processes import PATIENCE, wait_for

MEBIBYTE = 2**20
BUCKET = 2 * 128 * 1024  # what both token buckets of mode bandwidth let pass at once


def transfer(size: int, pings: int) -> tuple[float, float]:
    """In node 1: seconds until node 0 has confirmed so many bytes, and the shortest round trip."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ["RANK"] == "0":
        with socket.create_server(("", address[1])) as server:
            peer, _ = server.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(pings):
                peer.sendall(peer.recv(1))
            while size > 0:
                size -= len(peer.recv(MEBIBYTE))
            peer.sendall(b"x")
        return 0.0, 0.0
    if os.environ["RANK"] != "1":
        return 0.0, 0.0
    with connect(address) as peer:
        trips = []
        for _ in range(pings):
            begin = time.perf_counter()
            peer.sendall(b"x")
            peer.recv(1)
            trips.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        peer.sendall(bytes(size))
        peer.recv(1)
        return time.perf_counter() - begin, min(trips, default=0.0)


def connect(address: tuple[str, int]) -> socket.socket:
    """Node 0 may not listen yet."""
    peer: list[socket.socket] = []

    def connected() -> bool:
        with suppress(ConnectionRefusedError):
            peer.append(socket.create_connection(address, timeout=PATIENCE))
        return bool(peer)

    wait_for(connected)
    peer[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer[0]


def measured_rate(cluster: Cluster, size: int = 2 * MEBIBYTE) -> float:
    seconds, _ = cluster.run(transfer, size, 0, init=None)[1]
    return (size - BUCKET) * 8 / seconds


def test_no_link_is_faster_than_its_rate(shaped_mode: str, nothing_left: None) -> None:
    with Cluster(2, bandwidth="100mbit", mode=shaped_mode) as cluster:
        assert cluster.mode == shaped_mode
        assert cluster.missing == ""
        assert measured_rate(cluster) <= 1.1 * 100e6
        cluster.set_rate(1, "40mbit")
        assert measured_rate(cluster) <= 1.1 * 40e6
        cluster.set_rate(1, None)
        cluster.set_rate(0, "20mbit")  # the other direction of the other link
        assert measured_rate(cluster, MEBIBYTE) <= 1.1 * 20e6


def test_a_slow_node_slows_its_own_link(shaped_mode: str) -> None:
    with Cluster(2, slow_nodes={0: "20mbit"}, mode=shaped_mode) as cluster:
        assert measured_rate(cluster, MEBIBYTE) <= 1.1 * 20e6


@pytest.mark.parametrize("mode", ["switch", "shape"])
def test_no_message_is_faster_than_the_latency(mode: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"{mode}_mode")
    with Cluster(2, latency="3ms", slow_nodes={1: "1gbit,5ms"}, mode=mode) as cluster:
        assert cluster.run(transfer, 1, 20, init=None)[1][1] >= 2 * 4e-3
        cluster.set_latency(0, "25ms")
        assert cluster.run(transfer, 1, 5, init=None)[1][1] >= 2 * 15e-3


def test_a_frame_takes_its_place_in_the_downlink_when_it_arrives(switch_mode: str) -> None:
    """A slow sender's long queue to the same node does not hold up a fast one's messages."""
    shared = multiprocessing.get_context("fork").Value("i", 0)

    def flood_or_ping() -> float:
        rank = os.environ["RANK"]
        if rank == "2":  # minutes of datagrams for node 0 wait in its uplink
            with socket.socket(type=socket.SOCK_DGRAM) as slow:
                for _ in range(40):
                    slow.sendto(bytes(8000), (os.environ["MASTER_ADDR"], 9))
            shared.value = 1
            return 0.0
        if rank == "1":
            wait_for(lambda: shared.value == 1)
        return transfer(1, 10)[1]

    with Cluster(3, bandwidth="100mbit", slow_nodes={2: "20kbit"}, mode="switch") as cluster:
        job = cluster.start(flood_or_ping, init=None)
        outcomes = job.wait(PATIENCE)
        assert all(outcome.ok for outcome in outcomes), outcomes
        waiting = cluster.network
        assert isinstance(waiting, SwitchNetwork)
        # All 320 kB of the slow node need two minutes; round trips behind them would have to wait for them.
        assert waiting.traffic(2).sent < 40 * 8000
        assert waiting.traffic(0).received < 40 * 8000


def echo(answers: Any, done: Any) -> None:
    """Node 0 answers datagrams; the others count the answers they get."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with socket.socket(type=socket.SOCK_DGRAM) as channel:
        channel.settimeout(0.02)
        if os.environ["RANK"] == "0":
            channel.bind(address)
        while not done.value:
            with suppress(OSError):
                if os.environ["RANK"] == "0":
                    channel.sendto(*channel.recvfrom(64))
                else:
                    channel.sendto(b"x", address)
                    channel.recv(64)
                    answers[int(os.environ["RANK"])] += 1
            time.sleep(0.001)


def test_a_cut_node_hears_and_says_nothing_until_healed(shaped_mode: str, nothing_left: None) -> None:
    fork = multiprocessing.get_context("fork")
    answers, done = fork.Array("q", 3), fork.Value("i", 0)
    with Cluster(3, bandwidth="100mbit", mode=shaped_mode) as cluster:
        job = cluster.start(echo, answers, done, init=None)
        wait_for(lambda: min(answers[1:]) > 0)
        cluster.cut(1)
        time.sleep(0.1)  # what had been delivered is counted
        lost, others = answers[1], answers[2]
        wait_for(lambda: answers[2] > others + 20)  # time passes, for the others as before
        assert answers[1] == lost
        cluster.heal(1)
        wait_for(lambda: answers[1] > lost)
        cluster.cut(0)
        time.sleep(0.1)
        before = list(answers)
        time.sleep(0.2)
        assert list(answers) == before
        cluster.heal(0)
        wait_for(lambda: min(answers[1:]) > max(before))
        done.value = 1
        assert all(outcome.ok for outcome in job.wait(PATIENCE))


def test_the_switch_counts_bytes(switch_mode: str) -> None:
    with Cluster(2, mode="switch") as cluster:
        cluster.run(transfer, MEBIBYTE, 0, init=None)
        network = cluster.network
        assert isinstance(network, SwitchNetwork)
        assert MEBIBYTE < network.traffic(1).sent < 1.1 * MEBIBYTE
        assert network.traffic(0).received == network.traffic(1).sent
        assert network.traffic(0).dropped == network.traffic(1).dropped == 0


def test_nodes_are_named_by_their_number(shaped_mode: str) -> None:
    with Cluster(2, mode=shaped_mode) as cluster:
        for call in (cluster.cut, cluster.heal, lambda node: cluster.set_rate(node, "1mbit")):
            with pytest.raises(ConfigError, match="node=2: the cluster has the nodes 0 to 1"):
                call(2)
        with pytest.raises(ConfigError, match="bandwidth='1'"):
            cluster.set_rate(0, "1")


def test_bandwidth_alone_has_no_latency() -> None:
    with Cluster(2, latency="1ms", mode="loopback") as cluster:
        assert "no bandwidth, no latency" in cluster.missing
        with pytest.raises(ConfigError, match="set_latency: mode='loopback' has no links"):
            cluster.set_latency(0, "1ms")
        with pytest.raises(ConfigError, match="cut: mode='loopback'"):
            cluster.cut(1)


def test_outside_with_there_is_no_cluster() -> None:
    cluster = Cluster(2)
    with pytest.raises(InputError, match="inside its `with` block only"):
        cluster.cut(1)
