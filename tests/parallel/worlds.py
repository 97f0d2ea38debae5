"""Worlds in which ranks are lost: processes over a TCP store, of which some are not expected to report."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist

from flexpert.testing.rank_process import LOOPBACK, MODULES


def run_world(function, size, *args, lost=(), timeout=300.0):
    """From each rank but the lost ones to what `function(*args)` returned there.

    Raises:
        AssertionError: one of them raised, died or did not report.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes, processes = {}, []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, port, rank, size, function, args))
            process.start()
            theirs.close()
            processes.append(process)
            if rank not in lost:
                pipes[ours] = rank
        results = {}
        while pipes:
            ready = connection.wait(list(pipes), timeout)
            assert ready, f"ranks {sorted(pipes.values())} report nothing"
            for pipe in ready:
                rank = pipes.pop(pipe)
                succeeded, results[rank] = pipe.recv()
                assert succeeded, f"rank {rank}:\n{results[rank]}"
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(pipe, port, rank, size, function, args):
    torch.set_num_threads(1)
    if LOOPBACK in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    limit = timedelta(seconds=60)
    try:
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        report = True, function(*args)
    except BaseException:  # noqa: BLE001 - told to the caller, who raises it
        report = False, traceback.format_exc()
    pipe.send(report)
    pipe.recv()  # the store's host must outlive the others: all end when the caller kills them
