from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexpert.core.errors import ConfigError
from flexpert.core.files import check_writable


def test_what_can_be_written(tmp_path):
    check_writable(tmp_path / "new.json")
    (tmp_path / "old.json").write_text("", encoding="utf-8")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text(encoding="utf-8") == ""
    assert not (tmp_path / "new.json").exists()


def test_what_cannot_is_named_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=f"{tmp_path}: it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ConfigError, match=r"x\.json: there is no folder .*none"):
        check_writable(tmp_path / "none" / "x.json")
    with pytest.raises(ConfigError, match=r"/proc/x\.json: no file can be made there"):
        check_writable(Path("/proc/x.json"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"x\.json: this user may not write there"):
        check_writable(tmp_path / "x.json")
