"""`flexpert inspect`: its numbers against loops over tokens, its files, its errors."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers", minversion="5.23")

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from flexpert import CheckpointError, ConfigError, MoE, routing_scope
from flexpert.cli import main
from flexpert.convert import Granular, convert, save
from flexpert.integrations import inspection
from flexpert.integrations.inspection import inspect_model
from flexpert.models import SwinV2MoEForImageClassification, preset
from flexpert.monitor.routing_record import strongest_pairs
from flexpert.train.config import load_config

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def save_tokenizer(folder, size):
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"?": size}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    return path


def count(ids, kept, experts):
    """By loops over the experts of each token, and of those that it kept."""
    load, selected = [0] * experts, [0] * experts
    pairs = [[0] * experts for _ in range(experts)]
    unserved = 0
    for chosen, own in zip(ids, kept, strict=True):
        unserved += not own
        for expert in own:
            load[expert] += 1
        for expert in chosen:
            selected[expert] += 1
            for other in chosen:
                pairs[expert][other] += 1
    return {"load": load, "selected": selected, "coactivation": pairs, "unserved": unserved}


def check(report, ids, kept, probs):
    experts = report["experts"]
    want = count(ids, kept, experts)
    assert {name: report[name] for name in want} == want
    assert report["tokens"] == len(ids)
    assert report["dropped"] == [a - b for a, b in zip(want["selected"], want["load"], strict=True)]
    entropies = [-sum(p * math.log(p) for p in row) for row in probs]
    assert report["entropy"] == pytest.approx(sum(entropies) / len(ids), rel=1e-5)
    mean = sum(want["selected"]) / experts
    assert report["max_violation"] == pytest.approx(max(want["selected"]) / mean - 1)
    shares = [n / sum(want["load"]) for n in want["load"] if n]
    assert report["load_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(experts))


def test_a_model_of_transformers_against_loops(mixtral, text, tmp_path):
    model = mixtral(max_position_embeddings=20).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", size=len(LETTERS))
    report = inspect_model(tmp_path / "model", text=text, tokens=203)
    ids = torch.tensor([LETTERS.index(letter) for letter in text.read_text()[:203]])
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("gate"):
            module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
    with torch.no_grad():
        for i in range(0, 203, 20):
            model(ids[None, i : i + 20])
    assert [layer["layer"] + ".gate" for layer in report["layers"]] == list(seen)
    for layer, calls in zip(report["layers"], seen.values(), strict=True):
        choices = [row for _, _, ids_TK in calls for row in ids_TK.tolist()]
        probs = [row for logits, _, _ in calls for row in logits.double().softmax(-1).tolist()]
        check(layer, choices, choices, probs)
        assert layer["capacity"] == 0


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_a_model_of_ours_against_loops(language, text, tmp_path, capacity_factor):
    model = language(capacity_factor=capacity_factor, num_hidden_layers=3).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    with torch.no_grad():
        for moe in layers.values():
            moe.router.selection_bias.copy_(torch.tensor([0.1, 0.0, 0.05, 0.0]))
    model.save_pretrained(tmp_path / "model")
    report = inspect_model(tmp_path / "model", text=text, tokens=150)
    seen = {}
    for name, moe in layers.items():
        moe.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    data = torch.tensor(list(text.read_bytes()[:150]))
    with torch.no_grad():
        for part in (data[:128].view(2, 64), data[None, 128:]):
            model(part)
    for layer, (name, inputs) in zip(report["layers"], seen.items(), strict=True):
        assert layer["layer"] == name
        router = layers[name].router
        choices, kept, probs, capacity = [], [], [], 0
        for x in inputs:
            scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.T).detach()
            chosen = (scores + router.selection_bias).topk(2).indices.tolist()
            room = 2 * max(1, int(capacity_factor * math.ceil(len(chosen) / 4))) if capacity_factor else 10**9
            taken, own = [0] * 4, [[] for _ in chosen]
            for k in range(2):
                for t, experts in enumerate(chosen):
                    if taken[experts[k]] < room:
                        taken[experts[k]] += 1
                        own[t].append(experts[k])
            choices += chosen
            kept += own
            probs += (scores / scores.sum(-1, keepdim=True)).tolist()
            capacity += 4 * room
        check(layer, choices, kept, probs)
        assert layer["capacity"] == (capacity if capacity_factor else 0)
        assert (layer["drop_rate"] > 0) == bool(capacity_factor)
        best = max((choices_of(choices, a, b), -a, -b) for a in range(4) for b in range(a + 1, 4))
        (pair,) = strongest_pairs(layer, 1)
        assert pair[:3] == (-best[1], -best[2], best[0])


def test_a_converted_model_is_read_as_what_it_became(text, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval()
    convert(model, "*.1.mlp", Granular(copies=3, pieces_per_copy=2))
    save(model, tmp_path / "model")
    save_tokenizer(tmp_path / "model", size=len(LETTERS))
    (layer,) = inspect_model(tmp_path / "model", text=text, tokens=100)["layers"]
    ids = torch.tensor([LETTERS.index(letter) for letter in text.read_text()[:100]])
    with torch.no_grad(), routing_scope(model) as scope:
        model(ids[None])
    (stats,) = scope.stats.values()
    assert layer["layer"] == "model.layers.1.mlp"
    assert layer["load"] == stats.load_E.tolist()
    pairs = layer["coactivation"]  # the pieces of a copy are chosen together
    assert [pairs[e][e] for e in range(6)] == [pairs[e][e ^ 1] for e in range(6)]


def switch():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    config = SwitchTransformersConfig(**sizes, vocab_size=50, expert_capacity=15, decoder_start_token_id=0)
    return SwitchTransformersForConditionalGeneration(config)


def nllb():
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("ffn_dim", 8), ("attention_heads", 2), ("sparse_step", 2))}  # fmt: skip
    config = NllbMoeConfig(
        **sizes, vocab_size=50, d_model=16, num_experts=4, max_position_embeddings=50,
        moe_eval_capacity_token_fraction=0.3,
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config)


def taken_by_switch(logits):
    """One expert per token, in order of arrival, at most 15 in a sequence."""
    choices, kept = [], []
    for sequence in logits.tolist():
        room = [15] * 4
        for row in sequence:
            expert = row.index(max(row))
            room[expert] -= 1
            choices.append([expert])
            kept.append([expert] if room[expert] >= 0 else [])
    return choices, kept


def taken_by_nllb(logits):
    """Two experts per token, all first choices before all second ones, at most 0.3 of the tokens."""
    choices = [sorted(range(4), key=lambda e: -row[e])[:2] for row in logits.flatten(0, -2).tolist()]
    room, kept = [math.ceil(0.3 * len(choices))] * 4, [[] for _ in choices]
    for k in range(2):
        for own, chosen in zip(kept, choices, strict=True):
            room[chosen[k]] -= 1
            own.extend(chosen[k : k + 1] if room[chosen[k]] >= 0 else [])
    return choices, kept


@pytest.mark.parametrize(("make", "taken"), [(switch, taken_by_switch), (nllb, taken_by_nllb)])
def test_encoders_with_decoders_against_loops(make, taken, text, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("classifier.weight"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", size=len(LETTERS))
    monkeypatch.setattr(inspection, "LENGTH", 50)
    report = inspect_model(tmp_path / "model", text=text, tokens=150)
    ids = torch.tensor([LETTERS.index(letter) for letter in text.read_text()[:150]]).view(3, 50)
    start = model.config.decoder_start_token_id
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[2]}))
    with torch.no_grad():
        shifted = torch.cat([torch.full((3, 1), start), ids[:, :-1]], dim=1)
        model(input_ids=ids, decoder_input_ids=shifted)
    assert [layer["layer"] + ".router" for layer in report["layers"]] == list(seen)
    assert ["encoder" in name for name in seen] == [True, False]
    for layer, logits in zip(report["layers"], seen.values(), strict=True):
        choices, kept = taken(logits)
        check(layer, choices, kept, logits.double().softmax(-1).flatten(0, -2).tolist())
        assert layer["drop_rate"] > 0


def choices_of(choices, a, b):
    return sum(a in chosen and b in chosen for chosen in choices)


def test_the_command_writes_table_json_and_pages(language, text, tmp_path, capsys):
    language().save_pretrained(tmp_path / "model")
    out = tmp_path / "report"
    arguments = ["inspect", str(tmp_path / "model"), "--tokens", "100"]
    assert main([*arguments, "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"].startswith("held-out files of the standard library")
    assert report.pop("files") == [str(out / name) for name in ("report.json", "report.html", "load.png")]
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in out.iterdir()) == ["load.png", "report.html", "report.json"]
    assert (out / "load.png").read_bytes().startswith(b"\x89PNG")
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in html
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html)[1]
    assert json.loads(data) == {"layers": report["layers"]}
    assert main([*arguments, "--text", str(text)]) == 0
    page = capsys.readouterr().out
    assert f"100 tokens of {text}" in page
    assert re.search(r"model\.layers\.1\.mlp +100 +4 ", page)


def test_a_run_of_images_reads_its_test_images(tmp_path, tiny_fashion_mnist):
    run = tmp_path / "run"
    settings = [f"data.folder={tiny_fashion_mnist}"]
    config = load_config(ROOT / "configs" / "fashion_mnist.yaml", settings)
    torch.manual_seed(0)
    small = preset(
        "tiny", embed_dim=16, depths=[1, 2], num_heads=[2, 2], pretrained_window_sizes=[0, 0], num_experts=4
    )
    SwinV2MoEForImageClassification(small).save_pretrained(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    patches = (small.image_size // small.patch_size) ** 2
    report = inspect_model(run, tokens=12 * patches)
    assert report == {**inspect_model(run / "model", tokens=12 * patches), "model": str(run)}
    assert report["tokens"] == 12 * patches
    assert report["source"].startswith("test images")
    layer = report["layers"][-1]
    assert layer["tokens"] in [12 * patches // 4**i for i in range(3)]
    assert sum(layer["selected"]) == layer["tokens"] * small.top_k
    with pytest.raises(ConfigError, match="model of images; leave --text out"):
        inspect_model(run, text=tmp_path / "text.txt")
    shutil.move(run / "model", tmp_path / "alone")
    with pytest.raises(ConfigError, match="alone is a model of images.*folder of its run"):
        inspect_model(tmp_path / "alone")
    with pytest.raises(ConfigError, match="has no saved model"):
        inspect_model(run)


def test_errors_say_what_was_found(mixtral, text, tmp_path, capsys):
    assert main(["inspect", "mistralai/Mixtral-8x7B"]) == 2
    assert "there is no folder mistralai/Mixtral-8x7B" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no saved model: it has nothing"):
        inspect_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="config.json cannot be used: .*unheard_of"):
        inspect_model(tmp_path / "empty")
    dense = tmp_path / "dense"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(dense)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no routed experts"):
        inspect_model(dense)
    folder = tmp_path / "mixtral"
    mixtral().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no tokenizer that loads \(it has config.json.*save_pretrained"):
        inspect_model(folder)
    save_tokenizer(folder, size=50)
    with pytest.raises(ConfigError, match="no such file"):
        inspect_model(folder, text=tmp_path / "none.txt")
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(ConfigError, match="nothing.txt is empty"):
        inspect_model(folder, text=tmp_path / "nothing.txt")
    text.write_text("A", encoding="utf-8")
    with pytest.raises(ConfigError, match="ids up to 50, the model has 50 tokens"):
        inspect_model(folder, text=text)
    with pytest.raises(ConfigError, match="tokens=0"):
        inspect_model(folder, tokens=0)
    text.write_text("a quick fox", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    more = {**config, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(more), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of its config, such as model.layers.2"):
        inspect_model(folder, text=text)
    foreign = {**config, "architectures": ["OtherForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(foreign), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"architectures \['OtherForCausalLM'\].*code in the folder"):
        inspect_model(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be loaded as MixtralForCausalLM"):
        inspect_model(folder, text=text)
