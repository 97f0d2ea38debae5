from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from flexpert.cli import main
from flexpert.convert import load


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder of a small Llama with a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=40,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    words = Tokenizer(WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 40)}}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 23).view(2, 10)).logits


def of(folder: Path) -> torch.Tensor:
    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder))


def test_there_and_back(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe, back = tmp_path / "moe", tmp_path / "back"
    options = ["--layers", "model.layers.*.mlp", "--method", "clone", "--experts", "4", "--top-k", "2"]
    assert main(["convert", str(dense), str(moe), *options]) == 0
    page = capsys.readouterr().out
    assert "clone: 2 layers; the same outputs as before" in page
    assert "model.layers.1.mlp (4 experts of 24, top-2)" in page
    assert f"saved to {moe}" in page
    torch.testing.assert_close(logits(load(moe)), of(dense), rtol=1e-5, atol=1e-6)
    assert (moe / "tokenizer.json").read_text() == (dense / "tokenizer.json").read_text()
    assert main(["convert", str(moe), str(back), "--method", "dense", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] is True
    assert report["before"]["params"] > report["after"]["params"]
    assert "flexpert" not in json.loads((back / "config.json").read_text())
    torch.testing.assert_close(of(back), of(dense))


def test_every_method(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + i % 30}" for i in range(600)))
    runs = {
        "drop": (
            dense,
            "--layers *.0.mlp --method clone --experts 2 --redraw 0.5 --perturb 0.1 --router zero",
        ),
        "granular": (dense, "--layers *.mlp --method granular --copies 3 --pieces 2"),
        "slice": (dense, "--layers *.0.mlp *.1.mlp --method slice --experts 4 --top-k 2"),
        "importance": (
            dense,
            f"--layers *.mlp --method importance --experts 5 --shared 1 --calibration {text} --seed 3",
        ),
        "grown": (tmp_path / "granular", "--method grow --experts 8"),
        "cut": (tmp_path / "grown", "--method extract --keep 2 3 --layers *.1.mlp"),
        "one": (tmp_path / "granular", "--method dense --how keep --keep 1"),
    }
    for name, (folder, options) in runs.items():
        assert main(["convert", str(folder), str(tmp_path / name), *options.split(), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["exact"] is (name not in ("drop", "slice"))
        model = of(tmp_path / name) if name == "one" else logits(load(tmp_path / name))
        if report["exact"]:
            torch.testing.assert_close(model, of(dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method clone --layers *", "--method clone needs --experts"),
        ("--method clone --experts 2", "--method clone needs --layers"),
        ("--method granular --copies 2 --layers *", "--method granular needs --pieces"),
        ("--method importance --experts 2 --layers *", "--method importance needs --calibration"),
        ("--method slice --experts 2 --redraw 0.5 --layers *", "--redraw is no option of --method slice"),
        ("--method clone --experts 2 --top-k 3 --layers *", "top_k=3: expected an integer"),
        (
            "--method clone --experts 2 --layers nope",
            "layers='nope' matches no module; MLPs found in this Llama",
        ),
        ("--method slice --experts 5 --layers *", "num_experts=5 does not divide the MLP's hidden_dim=24"),
        ("--method grow --experts 4", "names no converted layer"),
        (
            "--method importance --experts 5 --layers * --calibration gone.txt",
            "--calibration gone.txt cannot be read",
        ),
    ],
)
def test_errors(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_model(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "*", "--method", "clone", "--experts", "2"]
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "out"), *options]) == 2
    assert (
        "gone has no config.json; give the folder of a saved model of transformers" in capsys.readouterr().err
    )
    assert main(["convert", str(dense), str(dense), *options]) == 2
    assert "dense exists; choose another folder, or remove it" in capsys.readouterr().err
    (dense / "model.safetensors").unlink()
    assert main(["convert", str(dense), str(tmp_path / "out"), *options]) == 2
    assert "dense cannot be loaded" in capsys.readouterr().err
    assert main(["convert", str(dense), str(tmp_path / "out"), *options[:3], "slice", "--experts", "2"]) == 2


def test_a_tokenizer_that_is_missing(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in dense.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text.txt").write_text("w1 w2")
    options = f"--layers * --method importance --experts 5 --calibration {tmp_path / 'text.txt'}".split()
    assert main(["convert", str(dense), str(tmp_path / "out"), *options]) == 2
    assert "has no tokenizer, which --calibration needs" in capsys.readouterr().err
