"""Events with their times, the overlap of two kinds, and the file for viewers."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

from flexpert.parallel.timeline import Event, Timeline, active_timeline, record_timeline
from flexpert.testing import run_ranks
from tests.parallel.transports import make_algorithm, make_world, matrices, rows_to_send

EVENTS = [
    Event("a", "communication", 1.0, 4.0, 0),
    Event("b", "communication", 3.0, 6.0, 1),
    Event("c", "compute", 0.0, 2.0),
    Event("d", "compute", 5.0, 9.0),
    Event("e", "compute", 5.5, 6.0),
    Event("f", "communication", 8.0, 8.5),
]


def test_overlap_is_the_time_in_which_both_kinds_ran():
    timeline = Timeline(EVENTS)
    assert timeline.seconds("communication") == 5.5
    assert timeline.seconds("compute") == 6.0
    assert timeline.overlap_seconds() == 1.0 + 1.0 + 0.5
    assert Timeline().overlap_seconds() == 0


def test_chrome_file(tmp_path):
    Timeline(EVENTS).to_chrome(tmp_path / "trace.json", rank=3)
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [entry["name"] for entry in entries] == ["c", "a", "b", "d", "e", "f"]
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["b"] == {
        "name": "b",
        "cat": "communication",
        "ph": "X",
        "ts": 3e6,
        "dur": 3e6,
        "pid": 3,
        "tid": "communication 1",
        "args": {"chunk": 1},
    }
    assert "args" not in by_name["c"]
    rows = {name: entry["tid"] for name, entry in by_name.items()}
    assert rows["a"] == rows["f"] == "communication 0"
    assert (rows["c"], rows["d"], rows["e"]) == ("compute 0", "compute 0", "compute 1")
    Timeline().to_chrome(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text()) == {"traceEvents": []}


def test_recording_is_on_inside_the_with_alone():
    assert active_timeline() is None
    with record_timeline() as outer:
        with record_timeline() as inner:
            assert active_timeline() is inner
        assert active_timeline() is outer
    assert active_timeline() is None
    with pytest.raises(KeyError), record_timeline():
        raise KeyError
    assert active_timeline() is None


def test_spans_are_compute_and_end_with_an_error_too():
    with record_timeline() as timeline:
        with timeline.span("experts", chunk=2):
            time.sleep(0.01)
        with pytest.raises(KeyError), timeline.span("bad"):
            raise KeyError
    first, second = timeline.events
    assert (first.name, first.kind, first.chunk, second.name) == ("experts", "compute", 2, "bad")
    assert first.end - first.begin >= 0.01
    assert second.begin >= first.end


def test_an_event_ends_once_whoever_is_first():
    timeline = Timeline()
    end = timeline.begin("x", "compute")
    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.events) == 1


def record_exchange(name):
    algorithm = make_algorithm(name)
    matrix = matrices(4, 2, 0)["random"]
    splits, rank = algorithm.known(matrix), algorithm.group.rank
    with record_timeline() as timeline:
        rows = [rows_to_send(matrix, rank, i, 2) for i in range(2)]
        pending = [algorithm.start(rows[i], splits, chunk=i, degree=2) for i in range(2)]
        for chunk in pending:
            chunk.wait()
        algorithm.group.all_reduce(torch.ones(2))
    algorithm.group.barrier()
    return [(event.name, event.chunk, event.kind) for event in timeline.events]


@pytest.mark.parametrize(
    ("name", "exchanges"),
    [("linear", ["all_to_all world"]), ("2dh", ["all_to_all inside", "all_to_all between"])],
)
def test_collectives_record_themselves(name, exchanges):
    want = [(exchange, chunk, "communication") for exchange in exchanges for chunk in range(2)]
    want.append(("all_reduce world", None, "communication"))
    for events in run_ranks(record_exchange, 4, name):
        assert sorted(events, key=str) == sorted(want, key=str)


def finish_late():
    """The end is that of the collective, though the wait comes later and the partner even later begins."""
    group = make_world()
    output = torch.empty(2)
    with record_timeline() as timeline:
        if group.rank == 1:
            time.sleep(0.2)
        pending = group.all_to_all(output, torch.ones(2), async_op=True)
        group.barrier()
        time.sleep(0.2)
        waited = time.perf_counter()
        pending.wait()
    exchange = next(event for event in timeline.events if event.name.startswith("all_to_all"))
    return exchange.end < waited, exchange.end - exchange.begin


def test_the_end_is_the_completion_not_the_wait():
    (early, seconds), (early_too, _) = run_ranks(finish_late, 2)
    assert early
    assert early_too
    assert seconds > 0
