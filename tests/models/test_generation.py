from __future__ import annotations

import pytest
import torch

from flexpert import ConfigError, InputError
from flexpert.models import MoELanguageForCausalLM, language_preset
from flexpert.models.generation import ByteStreamer, generate_text


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = language_preset(
        "tiny", hidden_size=16, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=40
    )
    return MoELanguageForCausalLM(config).eval()


def test_pieces_are_whole_characters_and_the_prompt_is_not_one():
    pieces = []
    streamer = ByteStreamer(pieces.append)
    streamer.put(torch.tensor([[0, 65, 66]]))
    for byte in "a€b".encode():
        streamer.put(torch.tensor([byte]))
    streamer.put(torch.tensor([0xE2]))  # the first byte of three
    streamer.end()
    assert pieces == ["a", "€", "b", "\ufffd"]


def test_a_seed_fixes_the_text_and_leaves_the_random_state(model):
    torch.manual_seed(5)
    state, pieces = torch.get_rng_state(), []
    text = generate_text(model, "ab", max_new_tokens=20, seed=1, write=pieces.append)
    assert torch.get_rng_state().equal(state)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert generate_text(model, "ab", max_new_tokens=20, seed=1) == text
    assert generate_text(model, "ab", max_new_tokens=20, seed=2) != text


def test_temperature_0_takes_the_likeliest_byte(model):
    ids = torch.tensor([[0, *b"ab"]])
    expected = bytearray()
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(int(ids[0, -1]))
    text = generate_text(model, "ab", max_new_tokens=6, temperature=0.0)
    assert text == expected.decode(errors="replace")


def test_what_cannot_be_is_refused(model):
    with pytest.raises(InputError, match="38 places"):
        generate_text(model, "a", max_new_tokens=39)
    with pytest.raises(ConfigError, match="temperature=-1"):
        generate_text(model, "a", temperature=-1)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate_text(model, "a", max_new_tokens=0)
    words = MoELanguageForCausalLM(language_preset("tiny", vocab_size=300, num_hidden_layers=1))
    with pytest.raises(InputError, match="300 tokens"):
        generate_text(words, "a")
