"""Checkpoints written by any number of ranks and read by any other."""

from __future__ import annotations

import pytest
import torch

from flexpert.testing import run_ranks
from tests.train.rank_cases import resume_runs, save_run

WORLDS = [1, 2, 3, 4]


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
            else run_ranks(resume_runs, world, list(saved), dense)
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


@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_any_number_of_ranks_resumes_any_other(tmp_path, dense):
    check_worlds(tmp_path, WORLDS, dense)


@pytest.mark.slow
def test_six_and_eight_ranks(tmp_path):
    check_worlds(tmp_path, [1, 2, 3, 4, 6, 8], "fsdp")
