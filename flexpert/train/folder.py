"""The folder of a run: made anew, found again, and the settings in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from pathlib import Path

import yaml

from flexpert.core.errors import ConfigError

from .config import TrainConfig, load_config

_MAY_DIFFER = ("ranks", "parallel")  # a run goes on under any layout
_LAUNCH = "launch.json"  # which torchrun started the run, so that its restarts find it


def restart_count() -> int:
    """How often torchrun has restarted this job; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def open_run(config: TrainConfig, resume: bool) -> Path:
    """The run's folder, with its settings in it.

    Restarted by torchrun, the job goes on with the run that it began before, whatever its number is.

    Args:
        config: settings.
        resume: go on with the run of this name; else a name that is taken gets a number.

    Raises:
        ConfigError: there is nothing to resume, the run has other settings, or no folder can be made.
    """
    if resume:
        folder = Path(config.output) / config.name
        if not folder.is_dir():
            raise ConfigError(f"there is no run {folder} to resume; start it without --resume")
        return _go_on(config, folder)
    earlier = _begun_by_this_launch(config) if restart_count() else None
    return _make(config) if earlier is None else _go_on(config, earlier)


def stored_config(folder: Path) -> TrainConfig:
    """The settings of a run.

    Raises:
        ConfigError: it has none, or a damaged one.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    return load_config(path)


def _go_on(config: TrainConfig, folder: Path) -> Path:
    if not (folder / "config.yaml").exists():  # killed before its first second was over
        _write_config(config, folder)
    stored, now = stored_config(folder).to_dict(), {**config.to_dict(), "name": folder.name}
    changed = sorted(key for key, value in stored.items() if value != now[key])
    if refused := [key for key in changed if key not in _MAY_DIFFER]:
        raise ConfigError(
            f"{folder} was run with other settings ({', '.join(refused)}); resume it with "
            f"the same, or start anew"
        )
    if changed:  # the file tells the layout of the run's last part, its metrics that of each line
        _write_config(config, folder)
    return folder


def _make(config: TrainConfig) -> Path:
    folder = Path(config.output) / config.name
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = Path(config.output) / f"{config.name}-{number}"
        except OSError as error:
            raise ConfigError(f"output={config.output!r}: cannot make {folder}: {error.strerror}") from None
    if launch := _launch():
        _write(folder / _LAUNCH, json.dumps({"torchrun": launch}) + "\n")
    _write_config(config, folder)
    return folder


def _launch() -> str | None:
    """What tells this torchrun from others, over all its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "none"):  # torchrun's name for all that have none; its agent is this process's parent
        return name and f"{socket.gethostname()} {os.getppid()}"
    return name


def _begun_by_this_launch(config: TrainConfig) -> Path | None:
    """The newest run of this name that this torchrun began in an earlier life; None: it came to none."""
    launch = _launch()
    found: list[tuple[int, Path]] = []
    for path in Path(config.output).glob(f"*/{_LAUNCH}"):
        name = re.fullmatch(rf"{re.escape(config.name)}(?:-(\d+))?", path.parent.name)
        if name and json.loads(path.read_text(encoding="utf-8"))["torchrun"] == launch:
            found.append((int(name[1] or 1), path.parent))
    return max(found)[1] if found else None


def _write_config(config: TrainConfig, folder: Path) -> None:
    settings = dataclasses.replace(config, name=folder.name).to_dict()
    _write(folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def model_folder(folder: Path) -> tuple[Path, TrainConfig]:
    """Where a run's saved model lies, and the run's settings.

    Raises:
        ConfigError: no such run, or no saved model.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"there is no run {folder}; `flexpert train` makes runs")
    saved = Path(folder) / "model"
    if not (saved / "config.json").exists():
        raise ConfigError(
            f"{folder} has no saved model; name the folder of a finished run, or resume it first"
        )
    return saved, stored_config(Path(folder))
