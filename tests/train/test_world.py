from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.train.world import World, cut, process_group, read_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_the_environment_of_torchrun() -> None:
    world = read_world(TORCHRUN | {"HOME": "/"})
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not world.is_main
    assert read_world({k: TORCHRUN[k] for k in reversed(TORCHRUN)}) == world


def test_one_process_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert read_world() == read_world({}) == World()
    assert read_world().is_main
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DistributedError, match="RANK set in the environment, WORLD_SIZE, LOCAL_RANK"):
        read_world()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8: expected 0 <= RANK < WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK=-1, WORLD_SIZE=8: expected"),
        ({"WORLD_SIZE": "0"}, "RANK=5, WORLD_SIZE=0: expected"),
        (
            {"LOCAL_RANK": "4"},
            "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4: expected 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE",
        ),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 exceeds WORLD_SIZE=8"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'.*expected integers; start the run with torchrun"),
        ({"RANK": ""}, "RANK=''.*expected integers"),
        ({"WORLD_SIZE": None}, "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE set in the environment, WORLD_SIZE not"),
    ],
)
def test_nonsense_is_refused(change: dict[str, str | None], message: str) -> None:
    environment = {name: text for name, text in (TORCHRUN | change).items() if text is not None}
    with pytest.raises(DistributedError, match=message):
        read_world(environment)


@pytest.mark.parametrize(("first", "end"), [(0, 0), (0, 1), (3, 10), (0, 12), (5, 130)])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_parts_are_contiguous_and_alike(first: int, end: int, parts: int) -> None:
    pieces = [cut(first, end, index, parts) for index in range(parts)]
    assert pieces[0][0] == first
    assert pieces[-1][1] == end
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
    sizes = [stop - start for start, stop in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert World().device() == World().device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device='cuda': PyTorch sees 0 GPUs here; give 'cpu'"):
        World().device("cuda")
    for name in ("tpu", "meta", "cpu:x", "mps"):
        with pytest.raises(ConfigError, match=f"device='{name}': expected 'cpu', 'cuda' or None"):
            World().device(name)
    two = World(1, 2, 1, 2)
    assert two.device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device='cuda:0' on 2 ranks: give 'cuda'"):
        two.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device='cuda:1': PyTorch sees 1 GPUs"):
        World().device("cuda:1")
    with pytest.raises(DistributedError, match=r"2 processes on a machine with 1 GPUs; start fewer"):
        two.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World().device("cuda:1") == torch.device("cuda:1")
    assert two.device() == two.device("cuda") == torch.device("cuda:1")


def test_a_group_is_made_used_and_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    cpu = torch.device("cpu")
    with process_group(World(), cpu, timeout=60):
        assert (dist.get_backend(), dist.get_world_size()) == ("gloo", 1)
        with process_group(World(), cpu):  # one that exists is used, and stays
            pass
        assert dist.is_initialized()
        with pytest.raises(DistributedError, match="rank 0 of 1, the environment says RANK=1, WORLD_SIZE=2"):
            process_group(World(1, 2), cpu).__enter__()
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="inside"), process_group(World(), cpu):
        raise ValueError("inside")
    assert not dist.is_initialized()


def test_a_group_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with (
        pytest.raises(DistributedError, match=r"rank 0 of 1 could not join the others at \?:\? by 'gloo'"),
        process_group(World(), torch.device("cpu")),
    ):
        pass
    with (
        pytest.raises(DistributedError, match="backend='glo': did you mean 'gloo'"),
        process_group(World(), torch.device("cpu"), backend="glo"),
    ):
        pass
    assert not dist.is_initialized()
