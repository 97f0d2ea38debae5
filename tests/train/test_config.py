from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flexpert.core.errors import ConfigError
from flexpert.train.config import TrainConfig, decode, load_config, parse_overrides

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert decode(TrainConfig, yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_overrides_reach_every_level_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\noptimizer: {epochs: 2}\nmodel: {preset: tiny}\n")
    config = load_config(path, ["optimizer.epochs=0.5", "seed=7", "model.num_experts=4", "data.folder=null"])
    assert (config.optimizer.epochs, config.seed) == (0.5, 7)
    assert config.model == {"preset": "tiny", "num_experts": 4}
    assert config.data.folder is None


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == 1e-3
    assert load_config(path, [f"optimizer.lr={text}"]).optimizer.lr == 1e-3


def test_a_word_with_an_e_stays_a_word() -> None:
    assert parse_overrides(["name=eel", "output=1e", "a=", "b=2e3"]) == {
        "name": "eel",
        "output": "1e",
        "a": None,
        "b": 2000.0,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.epoch=3", "did you mean 'epochs'"),
        ("sed=3", "did you mean 'seed'"),
        ("seed=abc", "seed='abc': expected int"),
        ("seed=-1", "seed=-1: expected an integer in 0"),
        ("parallel.plan=3", "parallel.plan=3: expected a group of settings or str"),
        ("seed=true", "seed=True: expected int"),
        ("optimizer.epochs=-1", "optimizer.epochs=-1.0: expected a number > 0"),
        ("optimizer.epochs=.nan", "expected a number > 0"),
        ("optimizer.dtype=fp8", "expected 'float32' or 'bfloat16'"),
        ("optimizer=3", "expected a group of settings"),
        ("seed.x=3", "not a group of settings"),
        ("log_every=0", "log_every=0: expected an integer >= 1"),
        ("timeout=0", "timeout=0.0: expected a number > 0"),
        ("optimizer.accumulate=0", "optimizer.accumulate=0: expected an integer in 1..batch_size"),
        ("optimizer.accumulate=999", "optimizer.accumulate=999: expected an integer in 1..batch_size"),
        ("name=a/b", "expected a name without '/'"),
        ("noequals", "expected key=value"),
        ("a=[", "not valid YAML"),
    ],
)
def test_bad_overrides_name_the_key_the_value_and_what_was_expected(
    tmp_path: Path, override: str, message: str
) -> None:
    path = write(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected keys and values")]
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the config .*it is no UTF-8 text"):
        load_config(tmp_path / "binary.yaml")
