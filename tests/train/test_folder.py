"""Which folder a run gets, the first time, resumed, and restarted by torchrun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexpert.core.errors import ConfigError
from flexpert.train.config import ParallelConfig, TrainConfig
from flexpert.train.folder import open_run, stored_config


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def under(monkeypatch: pytest.MonkeyPatch, launch: str, restart: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))


def test_a_restart_goes_on_with_the_newest_run_of_its_own_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(name="a.b", output=str(tmp_path))
    assert open_run(config, False).name == "a.b"  # without torchrun
    under(monkeypatch, "mine", 0)
    assert [open_run(config, False).name for _ in range(10)][-1] == "a.b-11"  # newer than -9
    under(monkeypatch, "other", 0)
    assert open_run(config, False).name == "a.b-12"
    under(monkeypatch, "mine", 1)
    assert open_run(config, False).name == "a.b-11"
    assert stored_config(tmp_path / "a.b-11").name == "a.b-11"
    under(monkeypatch, "mine", 2)
    (tmp_path / "a.b-11" / "config.yaml").unlink()  # killed before it was written
    assert open_run(config, False).name == "a.b-11"
    with pytest.raises(ConfigError, match=r"a\.b-11 was run with other settings \(seed\)"):
        open_run(TrainConfig(name="a.b", output=str(tmp_path), seed=1), False)
    assert open_run(config, True).name == "a.b"  # --resume names its run


def test_a_restart_that_had_no_folder_yet_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(name="run", output=str(tmp_path / "runs"))
    under(monkeypatch, "mine", 1)
    assert open_run(config, False).name == "run"
    shutil.rmtree(tmp_path / "runs")
    under(monkeypatch, "other", 0)
    open_run(config, False)
    open_run(TrainConfig(name="runner", output=config.output), False)
    under(monkeypatch, "mine", 1)
    assert open_run(config, False).name == "run-2"


def test_the_settings_tell_the_layout_that_runs_now(tmp_path: Path) -> None:
    alone = TrainConfig(output=str(tmp_path))
    folder = open_run(alone, False)
    layout = ParallelConfig(replicas=2, plan={"degree": 2})
    two = TrainConfig(output=str(tmp_path), ranks=2, parallel=layout)
    assert open_run(two, True) == folder
    assert stored_config(folder) == two
    assert open_run(alone, True) == folder
    assert stored_config(folder) == alone
    with pytest.raises(ConfigError, match=r"other settings \(log_every, seed\)"):
        open_run(TrainConfig(output=str(tmp_path), log_every=1, seed=3, ranks=2), True)
    assert stored_config(folder) == alone
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.yaml"):
        stored_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML"):
        stored_config(tmp_path)
