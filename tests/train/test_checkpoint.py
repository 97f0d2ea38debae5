from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from flexpert.core.errors import CheckpointError, InputError
from flexpert.train import manifest
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flexpert.train.checks import strict_load

FILES = ["__0_0.distcp", ".metadata", "manifest.json"]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(loaded: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype is tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name


def edit_manifest(path: Path, edit: Callable[[dict], None]) -> None:
    """Change a manifest and make its own hash right again."""
    content = json.loads((path / "manifest.json").read_text())
    content.pop("sha256")
    edit(content)
    content["sha256"] = manifest.hash_manifest(content)
    (path / "manifest.json").write_text(json.dumps(content))


def replace_metadata(path: Path, content: bytes) -> None:
    """Put other metadata in place of the genuine one, with right size and hash in the manifest."""
    (path / ".metadata").write_bytes(content)

    def edit(made: dict) -> None:
        made["files"][".metadata"] = {"size": len(content), "sha256": manifest._hash_file(path / ".metadata")}

    edit_manifest(path, edit)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The second of two checkpoints."""
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, {"w": torch.full((3, 5), float(step))}, {"step": step})
    return path


def test_round_trip_is_exact_for_every_dtype(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    tensors = {
        "float32": x,
        "float64": x.double() / 3,
        "float16": x.half(),
        "bfloat16": x.bfloat16(),
        "float8": x.to(torch.float8_e4m3fn),
        "complex64": torch.complex(x, -x),
        "int64": torch.tensor([2**63 - 1, -(2**63)]),
        "int32": torch.arange(-3, 3, dtype=torch.int32),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "random state": torch.get_rng_state(),
        "bool": x > 0,
        "special.values": special,
        "special.values.bf16": special.bfloat16(),
        "scalar": torch.tensor(3.5),
        "scalar int": torch.tensor(7),
        "empty": torch.empty(0),
        "empty rows": torch.empty(0, 4, dtype=torch.bfloat16),
        "empty columns": torch.empty(3, 0, dtype=torch.int64),
        "transposed": x.t(),
        "strided": x[::2, 1:3],
        "expanded": torch.tensor([1.0]).expand(4),
        "parameter": nn.Parameter(x.clone()),
        "a.b/c": x[0],
        "a.b": x[1],
    }
    path = save_checkpoint(tmp_path / "new" / "folder", 123, tensors, {})
    assert path == tmp_path / "new" / "folder" / "step-00000123"
    checkpoint = load_checkpoint(path)
    assert checkpoint.step == 123
    assert_same(checkpoint.tensors, tensors)
    assert not any(tensor.requires_grad for tensor in checkpoint.tensors.values())


def test_views_do_not_carry_their_base_along(tmp_path: Path):
    base = torch.zeros(1_000_000)
    path = save_checkpoint(tmp_path, 0, {"x": base[:10]}, {})
    assert sum(file.stat().st_size for file in path.iterdir()) < 50_000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@hypothesis.given(state=st.dictionaries(st.text(), json_values, max_size=4))
@hypothesis.settings(max_examples=20)
def test_state_round_trip(tmp_path_factory: pytest.TempPathFactory, state: dict):
    loaded = load_checkpoint(save_checkpoint(tmp_path_factory.mktemp("state"), 0, {}, state)).state
    assert repr(loaded) == repr(state)  # also the order of keys, -0.0, and True apart from 1


@pytest.mark.parametrize(
    "state",
    [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": [float("inf")]}, {"a": torch.zeros(1)}, {"a": {1, 2}}],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict):
    with pytest.raises(InputError, match="state"):
        save_checkpoint(tmp_path, 1, {}, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value", [3, "x", torch.empty(2, device="meta"), torch.eye(2).to_sparse(), nn.Linear(1, 1)]
)
def test_what_is_no_dense_tensor_is_refused(tmp_path: Path, value: object):
    with pytest.raises(InputError, match=r"tensors\['w'\].*give a dense torch.Tensor"):
        save_checkpoint(tmp_path, 1, {"w": value}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0)])
def test_impossible_numbers_are_refused(tmp_path: Path, step: int, keep: int):
    with pytest.raises(InputError, match=f"step={step}, keep={keep}"):
        save_checkpoint(tmp_path, step, {}, {}, keep=keep)


def test_only_the_newest_are_kept(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    for step in (5, 10, 99_999_999, 100_000_000):
        path = save_checkpoint(tmp_path, step, {"step": torch.tensor(step)}, {}, keep=3)
        assert latest_checkpoint(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-100000000", "step-99999999"]
    save_checkpoint(tmp_path, 100_000_001, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-100000001"]


def test_a_step_may_be_saved_again(tmp_path: Path):
    for attempt in range(12):
        path = save_checkpoint(tmp_path, 7, {"a": torch.tensor(attempt)}, {})
        assert latest_checkpoint(tmp_path) == path
        assert load_checkpoint(path).tensors["a"] == attempt
    assert len(list(tmp_path.iterdir())) == 2
    assert save_checkpoint(tmp_path, 8, {}, {}, keep=1) == latest_checkpoint(tmp_path)


def test_a_folder_with_a_later_step_is_not_written_to(saved: Path):
    with pytest.raises(CheckpointError, match=f"step=1 cannot be saved: {saved} is later.*remedy: move it"):
        save_checkpoint(saved.parent, 1, {}, {})
    assert load_checkpoint(saved).step == 2


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "step-12").mkdir()
    save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    save_checkpoint(tmp_path, 2, {}, {}, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == {"step-notes.txt", "step-12", "step-00000002"}


def test_the_path_on_this_machine_is_not_written(saved: Path):
    assert os.fsencode(saved.parent.name) not in (saved / ".metadata").read_bytes()


def test_a_checkpoint_may_be_moved(saved: Path, tmp_path: Path):
    moved = saved.rename(tmp_path / "elsewhere")
    assert load_checkpoint(moved).step == 2


@pytest.mark.parametrize("name", FILES)
class TestDamage:
    """Each is refused with the file's name, and the older checkpoint is pointed out and intact."""

    def refused(self, saved: Path, name: str, fault: str) -> None:
        with pytest.raises(
            CheckpointError, match=f"{saved / name}.*{fault}.*remedy.*step-00000001"
        ) as caught:
            load_checkpoint(saved)
        assert "\n" not in str(caught.value)
        assert load_checkpoint(saved.with_name("step-00000001")).step == 1

    def test_missing(self, saved: Path, name: str):
        (saved / name).unlink()
        self.refused(saved, name, "missing|cannot be read")

    @pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
    def test_truncated(self, saved: Path, name: str, part: float):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: int(part * len(content))])
        self.refused(saved, name, "truncated|damaged")

    def test_longer(self, saved: Path, name: str):
        (saved / name).write_bytes((saved / name).read_bytes() + b"0")
        self.refused(saved, name, "too long|damaged")

    @pytest.mark.parametrize("part", [0.0, 0.2, 0.5, 0.8, 0.99])
    def test_flipped_bit(self, saved: Path, name: str, part: float):
        content = bytearray((saved / name).read_bytes())
        content[int(part * len(content))] ^= 1
        (saved / name).write_bytes(content)
        self.refused(saved, name, "damaged|foreign")


def test_one_changed_digit_in_the_state_is_noticed(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, {}, {"learning_rate": 0.125})
    file = path / "manifest.json"
    file.write_text(file.read_text().replace("0.125", "0.126"))
    with pytest.raises(CheckpointError, match="damaged.*start anew"):
        load_checkpoint(path)


def test_a_folder_or_file_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        load_checkpoint(tmp_path)
    for content in ("[]", "{}", '{"format": "other"}', "3"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match="foreign"):
            load_checkpoint(tmp_path)


def test_newer_formats_are_refused_and_older_ones_migrate(saved: Path, monkeypatch: pytest.MonkeyPatch):
    edit_manifest(saved, lambda made: made.update(version=2))
    with pytest.raises(CheckpointError, match="version 2, this Flexpert reads up to 1; remedy: update it"):
        load_checkpoint(saved)
    for version in (0, None, "1"):
        edit_manifest(saved, lambda made, version=version: made.update(version=version))
        with pytest.raises(CheckpointError, match=f"unknown format version {version!r}"):
            load_checkpoint(saved)
    edit_manifest(saved, lambda made: made.update(version=0))
    monkeypatch.setitem(manifest.MIGRATIONS, 0, lambda made: {**made, "version": 1, "state": {"new": True}})
    assert load_checkpoint(saved).state == {"new": True}


@pytest.mark.parametrize(
    "edit",
    [
        lambda made: made.pop("files"),
        lambda made: made.update(step="2"),
        lambda made: made.update(state=[]),
        lambda made: made["files"].update({"../step-00000001/manifest.json": {"size": 1, "sha256": ""}}),
        lambda made: made["files"].update({"..": {"size": 1, "sha256": ""}}),
        lambda made: made["files"].update({"manifest.json": 3}),
        lambda made: made["files"].update({".metadata": {}}),
        lambda made: made["files"][".metadata"].pop("sha256"),
        lambda made: made["files"].pop(".metadata"),
        lambda made: made["files"].pop("__0_0.distcp"),
        lambda made: made["tensors"].pop("w"),
        lambda made: made["tensors"].update(w="float32[5, 3]"),
        lambda made: made["tensors"].update(v="float32[1]"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(saved: Path, edit: Callable[[dict], None]):
    edit_manifest(saved, edit)
    with pytest.raises(CheckpointError, match=r"remedy: move .* the older step-00000001"):
        load_checkpoint(saved)


class Attack:
    """Makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_something_is_refused(saved: Path, tmp_path: Path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "control")))  # noqa: S301 - shows that the attack is one
    assert (tmp_path / "control").exists()
    with (saved / ".metadata").open("rb") as file:
        genuine = pickle.load(file)  # noqa: S301 - written by this test
    hidden = Metadata(genuine.state_dict_metadata, Attack(tmp_path / "executed"), genuine.storage_data)
    for content in (pickle.dumps(Attack(tmp_path / "executed")), pickle.dumps(hidden)):
        replace_metadata(saved, content)
        with pytest.raises(CheckpointError, match=r"\.metadata is refused: it asks for posix\.mkdir"):
            load_checkpoint(saved)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "Tensor"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_globals_that_are_not_listed_are_refused(saved: Path, module: str, name: str, protocol: int):
    if protocol:
        content = b"\x80\x04" + b"".join(
            b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
        )
        content += b"\x93."
    else:
        content = f"c{module}\n{name}\n.".encode()
    replace_metadata(saved, content)
    with pytest.raises(CheckpointError, match=f"it asks for {module}.{name},"):
        load_checkpoint(saved)


def test_metadata_of_another_kind_is_refused(saved: Path):
    with (saved / ".metadata").open("rb") as file:
        genuine = file.read()

    def edited(edit: Callable[[Metadata], object]) -> bytes:
        metadata = pickle.loads(genuine)  # noqa: S301 - written by this test
        edit(metadata)
        return pickle.dumps(metadata)

    def first(metadata: Metadata, table: str):
        return next(iter(getattr(metadata, table).values()))

    for content in (
        b"",
        b"not a pickle",
        genuine[:-40],
        pickle.dumps(3),
        pickle.dumps({"state_dict_metadata": {}}),
        edited(lambda m: m.state_dict_metadata.update(w=3)),
        edited(lambda m: setattr(m, "state_dict_metadata", None)),
        edited(lambda m: setattr(m, "storage_data", None)),
        edited(lambda m: m.storage_data.clear()),
        edited(lambda m: first(m, "state_dict_metadata").chunks.clear()),
        edited(lambda m: setattr(first(m, "state_dict_metadata"), "size", torch.Size([15]))),
        edited(lambda m: setattr(first(m, "storage_data"), "relative_path", "../step-00000001/__0_0.distcp")),
        edited(lambda m: setattr(first(m, "storage_data"), "transform_descriptors", ["zstd"])),
        edited(lambda m: setattr(first(m, "storage_data"), "offset", 100)),
        edited(lambda m: setattr(first(m, "storage_data"), "length", "x")),
    ):
        replace_metadata(saved, content)
        with pytest.raises(CheckpointError, match="remedy"):
            load_checkpoint(saved)
    replace_metadata(saved, edited(lambda _: None))
    assert load_checkpoint(saved).step == 2  # the harness itself changes nothing


def test_a_full_disk_is_told_and_leaves_the_last_one(saved: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 3 could not be written.*\[Errno 27\].*remedy: make"):
            save_checkpoint(saved.parent, 3, {"large": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in saved.parent.iterdir()) == ["step-00000001", "step-00000002"]
    assert load_checkpoint(saved).step == 2


def test_an_interrupt_during_a_save_stays_an_interrupt(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved.parent, 3, {"w": torch.zeros(3)}, {})
    assert latest_checkpoint(saved.parent) == saved


# Kills a saving process at its first, second, ... access to the folder, until one comes through.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from flexpert.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
root = Path(sys.argv[1])
keep = int(sys.argv[2])
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}

def save(folder, step):
    save_checkpoint(folder, step, {"w": torch.full((64,), float(step))}, {"step": step}, keep=keep)

def die_at(folder, access):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in EVENTS and str(arguments[0]).startswith((str(folder), ".metadata", "__0_0", "manifest")):
            if count == access:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
    sys.addaudithook(hook)

save(root / "start", 1)
save(root / "start", 2)
found = []
for access in range(1000):
    folder = root / str(access)
    shutil.copytree(root / "start", folder)
    child = os.fork()
    if child == 0:
        die_at(folder, access)
        save(folder, 3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    last = load_checkpoint(latest_checkpoint(folder))
    assert last.tensors["w"].unique().tolist() == [last.step] == [last.state["step"]]
    found.append(last.step)
    save(folder, 4)
    assert load_checkpoint(latest_checkpoint(folder)).step == 4
    assert len(list(folder.iterdir())) == keep, list(folder.iterdir())
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(*found)
"""


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_leaves_the_last_good_one(tmp_path: Path, keep: int):
    """After every kill the newest checkpoint is whole, and the next save leaves no trace of the kill."""
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(keep)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = [int(step) for step in result.stdout.split()]
    assert found == sorted(found)
    assert found.count(2) >= 8  # killed while writing
    assert found.count(3) >= 4  # killed while removing older ones, and once not at all


class TestStrictLoad:
    def tensors(self) -> dict[str, torch.Tensor]:
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        return {f"model.{name}": tensor.clone() + 1 for name, tensor in module.state_dict().items()}

    def test_copies_all(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        parameters = list(module.parameters())
        tensors = self.tensors()
        strict_load(module, {**tensors, "optimizer.step": torch.tensor(3)}, "model.")
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, tensors[f"model.{name}"])
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))

    def test_without_a_prefix(self):
        module = nn.Linear(2, 2)
        strict_load(module, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        assert torch.equal(module.weight, torch.ones(2, 2))

    def test_lists_all_that_does_not_fit_and_copies_nothing(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        tensors = self.tensors()
        del tensors["model.0.bias"]
        tensors["model.0.weight"] = torch.ones(4, 2)
        tensors["model.1.bias"] = tensors["model.1.bias"].double()
        tensors["model.2.gate"] = torch.ones(1)
        with pytest.raises(CheckpointError) as caught:
            strict_load(module, tensors, "model.")
        for part in (
            "missing: 0.bias;",
            "unexpected: 2.gate;",
            "0.weight (float32[4, 2] in the checkpoint, float32[4, 3] in the module)",
            "1.bias (float64[4] in the checkpoint, float32[4] in the module)",
            "'model.*' do not fit Sequential",
        ):
            assert part in str(caught.value)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_a_broadcastable_shape_is_no_fit(self):
        with pytest.raises(CheckpointError, match="different: weight"):
            strict_load(nn.Linear(1, 2, bias=False), {"weight": torch.ones(2)})

    def test_long_lists_are_cut(self):
        with pytest.raises(CheckpointError, match="9, 90, 91, 92, 93 and 5 more|and 90 more"):
            strict_load(nn.Identity(), {str(i): torch.ones(1) for i in range(100)})
