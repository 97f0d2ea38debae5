"""The dictionary on disk: merged, locked, refused where it is damaged or foreign."""

from __future__ import annotations

import json
import multiprocessing
import warnings

import pytest

from flexpert.core.errors import ConfigError
from flexpert.core.plan import ExecutionPlan
from flexpert.tune.bucket import Bucket
from flexpert.tune.candidate import Candidate
from flexpert.tune.dictionary import Dictionary
from flexpert.tune.entry import Entry
from flexpert.tune.search import Search
from flexpert.tune.workload import LayerShape

SHAPE = LayerShape(
    model_dim=4, hidden_dim=8, output_dim=4, num_experts=4, expert_ranks=2, slices=2, ranks_per_node=2
)
PLACE = {"ranks": 4, "processor": "one of these"}
PLANS = [ExecutionPlan(r=1), ExecutionPlan(r=2), ExecutionPlan(r=0)]


def make(buckets, steps=30, place=PLACE, updated=1.0):
    """A dictionary with a search in each bucket, in which r = 2 turns out to be the best."""
    truth = dict(zip(PLANS, (1.0, 0.7, 1.2), strict=True))
    dictionary = Dictionary(place, 128)
    for rows in buckets:
        search = Search([Candidate(plan, 1.0 + 0.1 * i) for i, plan in enumerate(PLANS)])
        for _ in range(steps):
            plan = search.next() or search.plan
            search.record(plan, truth[plan])
        dictionary.entries[SHAPE, Bucket(rows=rows)] = Entry(search, updated=updated)
    return dictionary


def test_a_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "folder" / "tune.json"
    dictionary = make([0, 3])
    dictionary.save(path)
    found = Dictionary.read(path)
    assert found.to_dict() == dictionary.to_dict()
    assert found.entries.keys() == dictionary.entries.keys()
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["entries"][1]["meaning"] == "384..511 rows, even"
    assert data["entries"][0]["winner"]["r"] == 2
    assert data["entries"][0]["settled"]
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("flip", [False, True])
def test_merging_keeps_the_better_entry_in_any_order(flip):
    young, settled, newer = make([0], steps=3, updated=9.0), make([0, 1]), make([1, 2], updated=2.0)
    parts = [young, settled, newer][:: -1 if flip else 1]
    merged = Dictionary(PLACE, 128)
    for part in parts:
        merged.merge(part)
    entries = {bucket.rows: entry for (_, bucket), entry in merged.entries.items()}
    assert entries.keys() == {0, 1, 2}
    assert entries[0] is settled.entries[SHAPE, Bucket(rows=0)]
    assert entries[1] is newer.entries[SHAPE, Bucket(rows=1)]


def test_the_nearest_buckets_give_their_winners():
    dictionary = make([1, 10])
    other = make([2], steps=3)  # its search is not over: it knows nothing yet
    dictionary.merge(other)
    near, far = dictionary.nearest(SHAPE, Bucket(rows=2))
    assert near is dictionary.entries[SHAPE, Bucket(rows=1)]
    assert near.plan == far.plan == PLANS[1]
    assert Dictionary(PLACE, 128).nearest(SHAPE, Bucket(rows=2)) == []
    assert Bucket(rows=2).distance(Bucket(rows=3)) < Bucket(rows=2).distance(Bucket(rows=9))
    assert Bucket(rows=2).distance(Bucket(rows=2, skew=2)) == 2


def save_many(path, first):
    for rows in range(first, first + 10):
        make([rows], steps=3).save(path)


def test_nothing_is_lost_when_processes_save_at_once(tmp_path):
    path = tmp_path / "tune.json"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flexpert.tune"])
    processes = [context.Process(target=save_many, args=(path, 10 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert {bucket.rows for _, bucket in Dictionary.read(path).entries} == set(range(30))


def damage(data):
    """Files that are refused, each with a word of the reason."""
    entry = data["entries"][0]
    yield "", "no JSON"
    yield json.dumps(data)[:-20], "no JSON"
    yield json.dumps([]), "no dictionary"
    yield json.dumps({**data, "format": "other"}), "no dictionary"
    yield json.dumps({**data, "version": 2}), "version 2"
    yield json.dumps({**data, "entries": [{**entry, "bucket": {"rows": "x"}}]}), "rows='x'"
    yield json.dumps({**data, "entries": [{**entry, "samples": [[7, 1.0, 0]]}]}), "candidate 7"
    yield json.dumps({**data, "entries": [{**entry, "samples": [[0, "1", 0]]}]}), "no number"
    yield json.dumps({**data, "entries": [{**entry, "shape": {}}]}), "missing"
    yield json.dumps({k: v for k, v in data.items() if k != "place"}), "place"
    yield json.dumps({**data, "place": {**PLACE, "ranks": 8}}), "ranks 8, not 4"
    yield json.dumps({**data, "rows_per_bucket": 64}), "64 rows"
    yield json.dumps({**data, "rows_per_bucket": float("inf")}), "OverflowError"
    yield json.dumps({**data, "entries": [{**entry, "bucket": []}]}), "AttributeError"
    plan = {**entry["candidates"][0], "plan": ExecutionPlan(r=3).to_dict()}
    yield json.dumps({**data, "entries": [{**entry, "candidates": [plan, *entry["candidates"]]}]}), "r=3"
    yield json.dumps({**data, "entries": [{**entry, "kernels": ["fastest"]}]}), "kernel='fastest'"
    yield "\xff\xfe", "no JSON"


@pytest.mark.parametrize("case", range(17))
def test_a_damaged_or_foreign_file_is_refused_told_and_rebuilt(tmp_path, case):
    path = tmp_path / "tune.json"
    text, reason = list(damage(make([0]).to_dict()))[case]
    path.write_text(text, encoding="latin-1")
    own = Dictionary(PLACE, 128)
    with pytest.warns(UserWarning, match="rebuilt") as caught:
        own.take(path)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert str(caught[0].message).count(str(path)) == 1
    assert ("no JSON" in str(caught[0].message)) == (reason == "no JSON")
    assert own.entries == {}
    with pytest.warns(UserWarning, match="rebuilt"):
        make([5]).save(path)
    assert {bucket.rows for _, bucket in Dictionary.read(path).entries} == {5}


def test_no_file_is_no_fault(tmp_path):
    own = Dictionary(PLACE, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.take(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Dictionary.read(tmp_path / "none.json")
    (tmp_path / "folder").mkdir()
    with pytest.warns(UserWarning, match="rebuilt: .*folder: cannot be read: Is a directory"):
        own.take(tmp_path / "folder")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        own.save(tmp_path / "file" / "tune.json")


def test_buckets():
    assert Bucket.of([10, 20, 30, 40], 4, None, 10) == Bucket(rows=2, capacity=-1, skew=1)
    assert Bucket.of([10, 10, 10, 10], 4, 5, 10) == Bucket(rows=1, capacity=1, skew=0)
    assert Bucket.of([0, 0, 0, 40], 4, None, 10).skew == 2
    assert Bucket.of([0, 0], 4, None) == Bucket(rows=0)
    assert Bucket.from_dict(Bucket(rows=3, capacity=2, skew=1).to_dict()) == Bucket(
        rows=3, capacity=2, skew=1
    )
    assert Bucket(rows=2, capacity=2, skew=1).describe(10) == "20..29 rows, skewed, wide buffers"
    with pytest.raises(ConfigError, match="rows=True"):
        Bucket.from_dict({"rows": True})
