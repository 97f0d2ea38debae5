"""What the routers of a saved model do on real data; nothing is ever downloaded."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexpert.core.config import require_int
from flexpert.core.errors import ConfigError
from flexpert.monitor.routing_record import RoutingRecord

from .saved import SavedModel, class_of, find_model, load_model
from .sources import Routers

LENGTH = 512  # tokens of a window, at most
BATCH = 8  # windows, or images, of a call


def inspect_model(folder: Path, *, text: Path | None = None, tokens: int = 8192) -> dict[str, Any]:
    """Count what the routers of a saved model do.

    Args:
        folder: of a model saved by transformers or by Flexpert, or of a run.
        text: a file to read; None: held-out files of the interpreter's standard library. A model of images
            reads those of its run.
        tokens: tokens to read, at most; of an image model every patch of the first layer is one.

    Returns:
        "model" (folder), "source" (what was read), "tokens" (of the input), and "layers": see
        `flexpert.monitor.routing_record.RoutingRecord.report`.

    Raises:
        ConfigError: no such folder, an unknown kind of model, no routed experts, no tokenizer, no text.
        CheckpointError: weights that are missing or damaged.
    """
    require_int("tokens", tokens, least=1)
    found = find_model(Path(folder))
    from flexpert.train.model_task import quieten_transformers  # needs transformers, which is there

    quieten_transformers()
    check_text(found, text)
    if not found.is_converted:
        with torch.device("meta"):  # before any text and weight is read
            Routers(class_of(found)(copy.deepcopy(found.config)))
    inputs, source, count = _inputs(found, text, tokens)
    model = load_model(found)
    routers = Routers(model)
    records = {layer: RoutingRecord(layer) for layer in routers.layers}
    device = next(model.parameters()).device
    for batch in inputs:
        with torch.no_grad(), routers.watching():
            model(**{name: value.to(device) for name, value in batch.items()})
        stats = routers.stats
        for (layer, call), routing in routers.routings.items():
            records[layer].add(routing, stats[layer, call])
    routers.close()
    layers = [record.report() for record in records.values()]
    return {"model": str(folder), "source": source, "tokens": count, "layers": layers}


def check_text(found: SavedModel, text: Path | None) -> None:
    """Refuse, before any weight is read, a text that is not there or that the model cannot read."""
    if text is not None and found.reads_images:
        raise ConfigError(f"--text {text}: {found.folder} is a model of images; leave --text out")
    if text is not None and not text.is_file():
        raise ConfigError(f"--text {text}: no such file")


def _inputs(
    found: SavedModel, text: Path | None, tokens: int
) -> tuple[Iterator[dict[str, Tensor]], str, int]:
    """Batches of the model's arguments, what they are of, and how many tokens they have."""
    if found.reads_images:
        return _images(found, tokens)
    ids, source = _token_ids(found, text, tokens)
    limit = getattr(found.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    windows = _windows(ids, min(LENGTH, limit))
    if "decoder_input_ids" in inspect.signature(class_of(found).forward).parameters:
        windows = _for_both(windows, found.config)
    return windows, source, len(ids)


def _for_both(windows: Iterator[dict[str, Tensor]], config: Any) -> Iterator[dict[str, Tensor]]:
    """For a pair of encoder and decoder: the decoder reads the same, one token later."""
    starts = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    start = next((token for token in starts if token is not None), 0)
    for window in windows:
        ids = window["input_ids"]
        yield {**window, "decoder_input_ids": torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)}


def _windows(ids: Tensor, length: int) -> Iterator[dict[str, Tensor]]:
    """Windows without padding: whole ones together, the rest alone."""
    whole = len(ids) // length * length
    if whole:
        for part in ids[:whole].view(-1, length).split(BATCH):
            yield {"input_ids": part}
    if whole < len(ids):
        yield {"input_ids": ids[None, whole:]}


def _token_ids(found: SavedModel, text: Path | None, tokens: int) -> tuple[Tensor, str]:
    """int64 (N,), N <= tokens: bytes for a byte-level model of ours, else the ids of the tokenizer."""
    tokenizer = None if found.reads_bytes else _tokenizer(found.folder)
    content, source = _text(text, tokens if tokenizer is None else 8 * tokens)
    if tokenizer is None:
        return torch.tensor(list(content[:tokens])), source
    ids = tokenizer(content.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[:tokens], dtype=torch.int64)
    size = found.config.get_text_config().vocab_size
    if not len(ids):
        raise ConfigError(f"the tokenizer in {found.folder} makes no token of {source}; name another text")
    if int(ids.max()) >= size:
        raise ConfigError(
            f"the tokenizer in {found.folder} gives ids up to {int(ids.max())}, the model has {size} tokens; "
            f"put the model's own tokenizer there"
        )
    return ids, source


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ConfigError(
            f"{folder} has no tokenizer that loads (it has {names}); put the model's tokenizer.json and "
            f"tokenizer_config.json beside its weights, by tokenizer.save_pretrained({str(folder)!r})"
        ) from error


def _text(path: Path | None, limit: int) -> tuple[bytes, str]:
    """The first bytes of a text, and what it is."""
    if path is None:
        from flexpert.train.text import load_python_source

        dataset = load_python_source()
        return bytes(dataset.valid[:limit].tolist()), f"held-out files of {dataset.source}"
    try:
        with path.open("rb") as file:
            content = file.read(limit)
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}") from None
    if not content:
        raise ConfigError(f"--text {path} is empty; name a file with text")
    return content, str(path)


def _images(found: SavedModel, tokens: int) -> tuple[Iterator[dict[str, Tensor]], str, int]:
    """Test images of the run."""
    from flexpert.train import data
    from flexpert.train.images import ImageBatches

    config, vision = found.run, found.config
    if config is None:
        raise ConfigError(
            f"{found.folder} is a model of images, and nothing says of which; name the folder of its run"
        )
    places = [data.SYSTEM_FOLDER, data.cache_folder() / "fashion-mnist"]
    named = config.data.folder or os.environ.get(data.VARIABLE)
    if not named and not any(place.is_dir() for place in places):
        raise ConfigError(
            f"the images of the run are not on this machine; set ${data.VARIABLE} to their folder, or run "
            f"`flexpert evaluate`, which fetches them"
        )
    dataset = data.load_fashion_mnist(config.data.folder)
    batches = ImageBatches(dataset, config.data, image_size=vision.image_size, batch_size=BATCH, seed=0)
    patches = (vision.image_size // vision.patch_size) ** 2
    images = batches.evaluation(dataset.test_images[: max(1, tokens // patches)])
    parts = ({"pixel_values": part} for part in images.split(BATCH))
    return parts, f"test images from {dataset.source}", len(images) * patches


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.json, report.html and, with matplotlib, load.png, each at once or not at all.

    Args:
        report: of `inspect_model`.
        folder: made if need be.

    Returns:
        The files.

    Raises:
        ConfigError: the folder cannot be made.
    """
    import importlib.util

    from flexpert.monitor.plots import load_map
    from flexpert.monitor.routing_page import routing_page

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot make it: {error.strerror}") from None
    texts = {"report.json": json.dumps(report, indent=1) + "\n", "report.html": routing_page(report)}
    files = []
    for name, text in texts.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        files.append(temporary.replace(folder / name))
    if importlib.util.find_spec("matplotlib") is not None:
        temporary = folder / "load.tmp.png"
        load_map({layer["layer"]: _shares(layer["load"]) for layer in report["layers"]}, temporary)
        files.append(temporary.replace(folder / "load.png"))
    return files


def _shares(load: list[int]) -> list[float]:
    total = sum(load) or 1
    return [rows / total for rows in load]
