"""Text from a byte-level language model, as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from flexpert.core.config import require_int, require_number
from flexpert.core.errors import InputError

START = 0  # the byte before a text


class ByteStreamer(BaseStreamer):
    """Hands each piece of text on as soon as its bytes are complete; the prompt is not repeated.

    Args:
        write: called with each piece.
    """

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write, self._prompt_seen = write, False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, value: Tensor) -> None:
        """Take the ids of the prompt, then of one byte at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._hand_on(self._decoder.decode(bytes(value.flatten().tolist())))

    def end(self) -> None:
        """Hand on what is left of an unfinished character."""
        self._hand_on(self._decoder.decode(b"", final=True))

    def _hand_on(self, text: str) -> None:
        if text:
            self._write(text)


@torch.no_grad()
def generate_text(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    write: Callable[[str], Any] | None = None,
) -> str:
    """Continue a prompt, byte by byte, with the cache of keys and values.

    Args:
        model: byte-level (256 ids), such as `MoELanguageForCausalLM`.
        prompt: may be empty.
        max_new_tokens: bytes to add.
        temperature: 0 takes the likeliest byte each time.
        top_p: sample from the likeliest bytes that together have this probability.
        seed: of the sampling; the global random state is left as it was.
        write: called with each piece of the text as soon as it is there.

    Returns:
        The continuation, without the prompt; bytes that are no UTF-8 as U+FFFD.

    Raises:
        ConfigError: a value out of range.
        InputError: a prompt that leaves the model no room, or a model of other tokens than bytes.
    """
    require_int("max_new_tokens", max_new_tokens, least=1)
    require_number("temperature", temperature, least=0)
    require_number("top_p", top_p, above=0)
    if model.config.vocab_size != 256:
        raise InputError(f"the model has a vocabulary of {model.config.vocab_size} tokens; bytes need 256")
    ids = torch.tensor([[START, *prompt.encode()]], device=model.device)
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < max_new_tokens:
        raise InputError(
            f"max_new_tokens={max_new_tokens}: {room} places are left after a prompt of {ids.shape[1] - 1} "
            f"bytes (the model has {model.config.max_position_embeddings}); shorten one of them"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if write is not None:
            write(piece)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=START,
            streamer=ByteStreamer(take),
            **(sampling if temperature else {"do_sample": False}),
        )
    return "".join(pieces)
