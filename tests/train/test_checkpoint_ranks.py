"""Checkpoints written by any number of ranks and read by any other."""

from __future__ import annotations

import os
import re

import pytest
import torch

from flexpert.core.errors import DistributedError
from flexpert.testing import run_ranks
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint
from tests.train.rank_cases import (
    resume_runs,
    resume_with_faults,
    save_and_die,
    save_in_background,
    save_on_a_full_disk,
    save_run,
)


def assert_state(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype is value.dtype, name
        assert torch.equal(got[name], value), name


def check_worlds(tmp_path, worlds, dense):
    """Each of the numbers of ranks resumes what each other has written."""
    saved = {}
    for world in worlds:
        folder = str(tmp_path / str(world))
        # One rank is a process without ranks: its model is not parallelised.
        saved[folder] = [save_run(folder, dense)] if world == 1 else run_ranks(save_run, world, folder, dense)
    for world in worlds:
        results = (
            [resume_runs(list(saved), dense)]
            if world == 1
            else run_ranks(resume_runs, world, list(saved), dense, timeout=60.0 * len(worlds))
        )
        for i, runs in enumerate(saved.values()):
            resumed = [result[i] for result in results]
            for state, _, loss in resumed:
                assert_state(state, runs[0][0])
                torch.testing.assert_close(loss, runs[0][2], rtol=1e-12, atol=0)
            if len(runs) == world:
                for (_, random, _), (_, back, _) in zip(runs, resumed, strict=True):
                    assert torch.equal(random, back)
            else:  # of another number of ranks: different ones, and none that was there
                states = {random.numpy().tobytes() for _, random, _ in [*resumed, *runs]}
                assert len(states) == world + len(runs)


@pytest.mark.parametrize(("dense", "worlds"), [("ddp", [1, 2]), ("fsdp", [1, 2, 3, 4])])
def test_any_number_of_ranks_resumes_any_other(tmp_path, dense, worlds):
    check_worlds(tmp_path, worlds, dense)


def test_one_rank_and_one_process_are_the_same(tmp_path):
    """A model laid out over one rank, and one that is not laid out."""
    folders = [str(tmp_path / name) for name in ("rank", "process")]
    (rank,) = run_ranks(save_run, 1, folders[0], "fsdp")
    process = save_run(folders[1], "fsdp")
    for results in (resume_runs(folders, "fsdp"), *run_ranks(resume_runs, 1, folders, "fsdp")):
        for (state, random, loss), saved in zip(results, (rank, process), strict=True):
            assert_state(state, saved[0])
            assert torch.equal(random, saved[1])
            torch.testing.assert_close(loss, saved[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("victim", "where"), [(1, "write_tensors"), (1, "hash_files"), (0, "write_manifest")]
)
def test_a_killed_rank_leaves_the_last_good_one(tmp_path, victim, where):
    with pytest.raises(DistributedError) as caught:
        run_ranks(save_and_die, 2, str(tmp_path), victim, where)
    assert f"rank {victim} failed ---\nthe process ended with SIGKILL" in str(caught.value)
    words = r"(checkpoint save: torch.distributed.checkpoint: \w+ on group 'all ranks' \(ranks \(0, 1\), this"
    words += r"|all_gather on group 'ranks that work together' \(ranks \(0, 1\), this is [01]\) failed)"
    assert re.search(f"step 2 was not saved: {words}", str(caught.value))
    path = latest_checkpoint(tmp_path)
    assert path.name == "step-00000001"
    assert load_checkpoint(path).step == 1
    run_ranks(save_run, 2, str(tmp_path), "ddp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_rank_without_room_fails_all(tmp_path):
    (first, left), (second, _) = run_ranks(save_on_a_full_disk, 2, str(tmp_path))
    for text in (first, second):
        assert text.startswith("CheckpointError: step 2 could not be written")
        assert "File too large" in text
    assert left == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 3


def test_a_damaged_part_is_refused_by_all_and_nothing_is_loaded(tmp_path):
    saved = run_ranks(save_run, 2, str(tmp_path), "fsdp")
    for errors, same, resumed in run_ranks(resume_with_faults, 2, str(tmp_path)):
        assert same
        for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            assert "CheckpointError" in errors[name]
            assert f"{name} is damaged" in errors[name]
        assert "missing: other" in errors["other model"]
        assert_state(resumed, saved[0][0])


def test_a_save_in_the_background(tmp_path):
    results = run_ranks(save_in_background, 2, str(tmp_path))
    wanted = results[0][0]
    for _, _, published, name, told, _ in results:
        assert published is None  # training went on before the checkpoint was there
        assert name == "step-00000002"
        assert told.startswith("CheckpointError: step 3 could not be written")
        assert "No space left" in told
    second, last = (load_checkpoint(tmp_path / f"step-0000000{number}") for number in (2, 5))
    assert {k: v for k, v in second.tensors.items() if not k.startswith("random")}.keys() == wanted.keys()
    assert_state({name: second.tensors[name] for name in wanted}, wanted)
    assert_state({name: last.tensors[name] for name in wanted}, results[0][5])
    assert latest_checkpoint(tmp_path).name == "step-00000005"


@pytest.mark.slow
@pytest.mark.skipif("FLEXPERT_MANY_RANKS" not in os.environ, reason="set FLEXPERT_MANY_RANKS for eight ranks")
def test_six_and_eight_ranks(tmp_path):
    check_worlds(tmp_path, [1, 2, 3, 4, 6, 8], "fsdp")
