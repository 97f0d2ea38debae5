"""Waves: every row of an expert that is here in one part of one wave, within the buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexpert.ops import waves as module
from flexpert.ops.products import padded, segments, slack
from flexpert.ops.waves import WAVE_ROWS, waves

DTYPES = [torch.float32, torch.bfloat16]


def shape(wave):
    return [part.own.stop - part.own.start for part in wave.parts]


def test_waves_are_full_and_large_experts_alone():
    counts = torch.tensor([600, 400, 100, 0, 50, WAVE_ROWS, 7, 5000, 1, 2])
    got = list(waves(counts, None, torch.float32))
    assert [shape(wave) for wave in got] == [[600, 400, 100], [50], [1024], [7], [5000], [1, 2]]
    assert [(wave.start, wave.stop) for wave in got][2:4] == [(1150, 2174), (2174, 2181)]


def test_absent_experts_end_a_wave_and_empty_ones_do_not():
    counts, slots = torch.tensor([3, 0, 4, 5, 6]), torch.tensor([2, -1, 0, -1, 2])
    got = list(waves(counts, slots, torch.float32))
    assert [shape(wave) for wave in got] == [[3, 4], [6]]
    assert got[0].slots(counts.device).tolist() == [2, 0]
    assert got[0].edges(counts.device).tolist() == [0, 3, 7]


def test_sizes_of_waves_are_few_in_half_precision():
    sizes = {
        wave.size
        for count in range(1, 200)
        for wave in waves(torch.tensor([count, 3, 17]), None, torch.bfloat16)
    }
    assert all(size % 32 == 0 for size in sizes)
    assert [wave.size for wave in waves(torch.tensor([5]), None, torch.bfloat16)] == [8]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    experts=st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 31, 32, 33, 90, 200]), st.integers(-1, 3)), max_size=9
    )
)
def test_parts_are_the_segments(dtype, experts):
    counts = torch.tensor([count for count, _ in experts], dtype=torch.int64)
    slots = torch.tensor([slot for _, slot in experts], dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WAVE_ROWS", 100)
        got = list(waves(counts, slots, dtype))
    own = [(p.slot, w.start + p.own.start, w.start + p.own.stop) for w in got for p in w.parts]
    assert own == list(segments(counts, slots))
    for wave in got:
        assert wave.parts[-1].own.stop == wave.stop - wave.start <= wave.size
        assert wave.size <= wave.stop - wave.start + slack(dtype)
        for part in wave.parts:
            assert part.rows == slice(part.own.start, part.spare.stop)
            assert part.spare.start == part.own.stop
            assert part.rows.stop <= wave.size
            assert part.rows.stop - part.rows.start == padded(part.own.stop - part.own.start, dtype)
