"""`flexpert convert`: MLPs of a saved model become experts, or experts become MLPs again."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError

NAME = "convert"
HELP = "Turn MLPs of a dense model into MoE layers, or back; grow and cut experts."
EXAMPLES = (
    "flexpert convert MODEL OUT --layers 'model.layers.*.mlp' --method clone --experts 8 --top-k 2",
    "flexpert convert MODEL OUT --layers '*.mlp' --method clone --experts 8 --redraw 0.5",
    "flexpert convert MODEL OUT --layers '*.mlp' --method granular --copies 4 --pieces 4",
    "flexpert convert MODEL OUT --layers '*.mlp' --method importance --experts 7 --calibration text.txt",
    "flexpert convert MOE OUT --method dense --how mean",
    "flexpert convert MOE OUT --method extract --keep 0 2 5",
)
_METHODS = ("clone", "granular", "slice", "importance", "dense", "grow", "extract")
# Files beside a model that go with it unchanged: tokenizer and preprocessor.
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template.*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_LENGTH = 256  # tokens in a piece of calibration text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, method and its options."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of a saved model of transformers, converted or not")
    add("output", type=Path, metavar="OUT", help="new folder")
    add("--layers", nargs="+", metavar="GLOB", help="which MLPs, by module name; needed for dense models")
    add("--method", choices=_METHODS, required=True)
    add("--experts", type=int, metavar="E", help="clone, slice, importance, grow: number of experts")
    add("--top-k", type=int, metavar="K", help="experts per token")
    add("--copies", type=int, metavar="G", help="granular: copies of the MLP")
    add("--pieces", type=int, metavar="k", help="granular: pieces of each copy")
    add("--shared", type=int, metavar="N", help="importance: width of the shared expert, in experts (1)")
    add("--shared-ratio", type=float, metavar="SHARE", help="importance: share of the neurons that is shared")
    add("--router", choices=("random", "zero"), help="initial rows of the router")
    add("--redraw", type=float, metavar="SHARE", help="clone: of each copy's neurons, drawn anew")
    add("--perturb", type=float, metavar="SHARE", help="clone: noise, of the weights' deviation")
    add("--calibration", type=Path, metavar="TEXT", help="importance: a text file of what the model is for")
    add("--how", choices=("mean", "keep"), help="dense: mean of the experts, or the one of --keep")
    add("--keep", type=int, nargs="+", metavar="I", help="extract: indices of experts; dense: of one copy")
    add("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Convert and save; the report as plain data.

    Raises:
        ConfigError: an option that the method does not take, or lacks.
    """
    from flexpert import convert

    plan = _plan(options)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists; choose another folder, or remove it")
    model = _load(options.model)
    report = plan(model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{options.output.name}.tmp-", dir=options.output.parent
    ) as name:
        folder = Path(name) / "model"
        if hasattr(model.config, "flexpert"):
            convert.save(model, folder)
        else:  # dense again
            model.save_pretrained(folder)
        for file in (file for pattern in _BESIDE for file in options.model.glob(pattern)):
            shutil.copy2(file, folder / file.name)
        folder.rename(options.output)
    return {**report.to_dict(), "output": str(options.output)}


def describe(result: dict[str, Any]) -> str:
    """The report as text."""
    from flexpert.convert.report import describe as table

    return f"{table(result)}\n\nsaved to {result['output']}"


def _plan(options: argparse.Namespace) -> Callable[[Any], Any]:
    """What is to be done with the model, from the options; they are checked here, before it is loaded."""
    from flexpert import convert

    method, layers = options.method, options.layers or "*"
    given = {
        name: value
        for name in (
            "experts", "top_k", "copies", "pieces", "shared", "shared_ratio", "router", "redraw", "perturb",
            "calibration", "how", "keep",
        )
        if (value := getattr(options, name)) is not None
    }  # fmt: skip
    needs, takes = _ARGUMENTS[method]
    if wrong := [name for name in given if name not in (*needs, *takes)]:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} is no option of --method {method}")
    missing = [name for name in needs if name not in given]
    if method in convert.METHODS and options.layers is None:
        missing.append("layers")
    if missing:
        raise ConfigError(f"--method {method} needs --{missing[0].replace('_', '-')}")
    if method == "dense":
        keep = given.get("keep", [0])[0]
        return lambda model: convert.to_dense(model, layers, how=given.get("how", "mean"), keep=keep)
    if method == "grow":
        return lambda model: convert.grow(
            model, layers, given["experts"], top_k=given.get("top_k"), seed=options.seed
        )
    if method == "extract":
        return lambda model: convert.extract(model, layers, given["keep"], top_k=given.get("top_k"))
    text = given.pop("calibration", None)
    names = {"experts": "num_experts", "pieces": "pieces_per_copy", "shared": "num_shared"}
    how = convert.METHODS[method](**{names.get(name, name): value for name, value in given.items()})

    def apply(model: Any) -> Any:
        batches = None if text is None else _batches(options.model, text)
        return convert.convert(model, layers, how, calibration=batches, seed=options.seed)

    return apply


# By method: the options it needs, and others it takes.
_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "clone": (("experts",), ("top_k", "router", "redraw", "perturb")),
    "granular": (("copies", "pieces"), ("router",)),
    "slice": (("experts",), ("top_k", "router")),
    "importance": (("experts", "calibration"), ("top_k", "shared", "shared_ratio", "router")),
    "dense": ((), ("how", "keep")),
    "grow": (("experts",), ("top_k",)),
    "extract": (("keep",), ("top_k",)),
}


def _load(folder: Path) -> Any:
    """The model of a folder, converted before or not."""
    from flexpert.convert.storage import import_transformers, load, model_class

    transformers = import_transformers()
    import flexpert.models  # noqa: F401  (makes SwinV2-MoE known)

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a saved model of transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "flexpert"):
            return load(folder)
        return model_class(config).from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be loaded: {error}") from error


def _batches(folder: Path, text: Path) -> list[Any]:
    """Up to 32 pieces of a text, as the model's tokenizer reads it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no tokenizer, which --calibration needs: {error}") from error
    try:
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {text} cannot be read: {error}") from error
    pieces = list(ids[: 32 * _LENGTH].split(_LENGTH))
    whole = [piece for piece in pieces if len(piece) == _LENGTH] or pieces[:1]
    return [piece[None] for piece in whole if len(piece)]
