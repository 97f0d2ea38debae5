from __future__ import annotations

import threading

import pytest
import torch

from flexpert.core.errors import CheckpointError, InputError
from flexpert.train import checkpoint
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint
from flexpert.train.saver import CheckpointSaver


@pytest.fixture
def held(monkeypatch):
    """Saves wait for this event."""
    event, write = threading.Event(), checkpoint.write_tensors

    def write_late(*args):
        assert event.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", write_late)
    yield event
    event.set()


def test_the_tensors_may_change_while_a_save_is_under_way(tmp_path, held):
    w, state = torch.arange(12.0).reshape(3, 4), {"list": [1]}
    with CheckpointSaver(tmp_path) as saver:
        saver.save(1, {"w": w, "columns": w.t()[1:]}, state)
        w.zero_()
        state["list"].append(2)
        assert latest_checkpoint(tmp_path) is None
        held.set()
        path = saver.wait()
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.tensors["w"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(loaded.tensors["columns"], torch.arange(12.0).reshape(3, 4).t()[1:])
    assert loaded.state == {"list": [1]}


def test_the_next_save_waits_for_the_one_before(tmp_path, held):
    saver = CheckpointSaver(tmp_path)
    saver.save(1, {"w": torch.ones(1)}, {})
    second = threading.Thread(target=saver.save, args=(2, {"w": torch.ones(1)}, {}))
    second.start()
    second.join(0.2)  # without the wait it would be through by now
    assert second.is_alive()
    assert sum(thread.name == "flexpert-checkpoint" for thread in threading.enumerate()) == 1
    held.set()
    second.join()
    saver.close()
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_is_told_once_and_the_saver_goes_on(tmp_path, monkeypatch, asynchronous):
    def fail(*args):
        raise OSError(28, "No space left on device")

    def save():
        saver.save(1, {}, {})
        saver.wait()

    saver = CheckpointSaver(tmp_path, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", fail)
        with pytest.raises(CheckpointError, match=r"step 1 could not be written.*No space left"):
            save()
    assert saver.wait() is None
    saver.save(2, {}, {})
    assert saver.wait() == tmp_path / "step-00000002"
    with pytest.raises(InputError, match="step=-1"):  # refused at once, not later
        saver.save(-1, {}, {})
    saver.close()


def test_the_end_tells_an_error_unless_there_is_another(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", fail)
    with pytest.raises(CheckpointError, match="No space left"), CheckpointSaver(tmp_path) as saver:
        saver.save(1, {}, {})

    def train():
        with CheckpointSaver(tmp_path) as saver:
            saver.save(1, {}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
