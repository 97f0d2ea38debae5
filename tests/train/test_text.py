from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexpert.core.errors import InputError
from flexpert.train.text import TextBatches, load_python_source


def write(folder: Path, count: int = 60, size: int = 100) -> None:
    for i in range(count):
        path = folder / f"part{i % 3}" / f"file{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([97 + i % 26]) * size)


def test_whole_files_are_held_out_and_every_file_is_used_once(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\xff" * 1000)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.txt").write_bytes(b"?" * 1000)
    one, two = load_python_source(str(tmp_path)), load_python_source(str(tmp_path))
    assert one.train.equal(two.train)
    assert one.valid.equal(two.valid)
    assert len(one.train) + len(one.valid) == 60 * 101
    parts = [bytes(part.tolist()).split(b"\0") for part in (one.train, one.valid)]
    assert all(part[0] == b"" and {len(file) for file in part[1:]} == {100} for part in parts)
    assert 0 < len(one.valid) < len(one.train) / 5
    assert "60 files" in one.source


def test_the_standard_library_is_read_without_its_tests() -> None:
    text = load_python_source()
    assert len(text.train) > 5_000_000
    assert b"class TextWrapper" in bytes(text.train.tolist()) + bytes(text.valid.tolist())
    assert "standard library" in text.source


def test_no_text_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        load_python_source(str(tmp_path / "nowhere"))
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(InputError, match="1 files"):
        load_python_source(str(tmp_path))


def batches(seed: int = 0, batch_size: int = 4) -> TextBatches:
    return TextBatches(torch.arange(200, dtype=torch.uint8), length=7, batch_size=batch_size, seed=seed)


def test_a_batch_follows_from_seed_and_step() -> None:
    ahead, one, other = batches(), batches(), batches(seed=1)
    steps = [ahead.train(step) for step in range(20)]
    for step in (13, 2, 19, 0):  # in any order: a resumed run begins anywhere
        assert one.train(step).equal(steps[step])
    assert not other.train(0).equal(steps[0])
    assert torch.cat([one.train(3, (0, 1)), one.train(3, (1, 4))]).equal(steps[3])
    assert one.train(3, (2, 2)).shape == (0, 8)


def test_an_epoch_reads_no_byte_twice_and_windows_follow_the_text() -> None:
    source = batches()
    epoch = torch.cat([source.train(step) for step in range(source.steps_per_epoch)])
    assert (epoch.diff(dim=1) == 1).all()
    predicted = epoch[:, 1:].flatten()
    assert len(predicted.unique()) == len(predicted)
    again = torch.cat([source.train(step + source.steps_per_epoch) for step in range(source.steps_per_epoch)])
    assert not again.equal(epoch)


def test_a_text_too_short_for_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"200 bytes.*40 windows"):
        batches(batch_size=40)
