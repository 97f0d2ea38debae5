"""Text from the saved language model of a run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError

from .folder import model_folder


def generate(
    folder: Path, prompt: str, *, write: Callable[[str], Any] | None = None, **sampling: Any
) -> dict[str, Any]:
    """Continue a prompt with a run's saved model.

    Args:
        folder: of the run.
        prompt: may be empty.
        write: called with each piece of text as soon as it is there.
        sampling: see `flexpert.models.generation.generate_text`.

    Returns:
        "prompt", "text" (the continuation), "tokens", "seconds" and "tokens_per_second", the prompt's pass
        included.

    Raises:
        ConfigError: no such run, no saved model, or one that is no language model.
    """
    saved, config = model_folder(folder)
    if config.task != "language":
        raise ConfigError(f"{folder} is a run of task={config.task!r}; only language models generate text")
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("the language model needs transformers: pip install 'flexpert[hf]'")
    from flexpert.models.generation import generate_text
    from flexpert.models.moe_lm import MoELanguageForCausalLM

    from .model_task import quieten_transformers

    quieten_transformers()
    model = MoELanguageForCausalLM.from_pretrained(saved).eval()
    began = time.perf_counter()
    text = generate_text(model, prompt, write=write, **sampling)
    seconds = time.perf_counter() - began
    tokens = int(sampling.get("max_new_tokens", 0)) or len(text.encode())
    return {
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }
