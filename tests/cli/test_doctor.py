from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from flexpert.cli import doctor, main
from flexpert.ops import select
from flexpert.ops.cpu import build as native
from flexpert.ops.cpu.seal import seal


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that asks the doctor, with a library of these features or the mode off."""

    def ask(library: native.Native | None = None) -> dict:
        monkeypatch.setenv("FLEXPERT_NATIVE", "off" if library is None else "auto")
        monkeypatch.setattr(native, "_native", library)
        monkeypatch.setattr(select, "_live", {})
        assert main(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def kernels(found: dict) -> dict[str, tuple[str, str]]:
    return {row["dtype"]: (row["backend"], row["instructions"]) for row in found["kernels"]}


def test_kernels_by_what_the_processor_has(facts) -> None:
    library = SimpleNamespace()
    found = facts(native.Native(library, "", avx2=True, avx512=True, avx512_bf16=True, amx=True))
    assert kernels(found)["float32"] == ("native", "AVX-512")
    assert kernels(found)["bfloat16"] == ("native", "AMX")
    assert kernels(found)["float16"][0] == kernels(found)["float64"][0] == "portable"
    assert found["native"]["live"]
    assert found["processor"]["features"]["amx_bf16"] is True
    found = facts(native.Native(library, "", avx512=True, avx512_bf16=True, amx=False))
    assert kernels(found)["bfloat16"] == ("native", "AVX512_BF16")
    assert found["processor"]["features"]["amx_tile"] is False
    found = facts(native.Native(library, "", avx2=True))
    assert kernels(found)["float32"] == kernels(found)["bfloat16"] == ("native", "AVX2")
    assert kernels(found)["float16"][0] == "portable"
    assert {name for name, has in found["processor"]["features"].items() if has} == {"avx2", "fma"}
    assert {row["why"] for row in found["operators"] if row["live"] and row["operator"] == "route"} == {
        "first backend that accepts torch.float32 on cpu, with AVX2"
    }


def test_a_cap_is_told_and_hides_no_feature(facts, monkeypatch) -> None:
    monkeypatch.setenv("FLEXPERT_INSTRUCTIONS", "avx2")
    features = dict.fromkeys(("avx2", "avx512", "avx512_bf16", "amx"), True)
    found = facts(native.Native(SimpleNamespace(), "", **features, cap="avx2"))
    assert kernels(found)["float32"] == kernels(found)["bfloat16"] == ("native", "AVX2")
    assert all(found["processor"]["features"].values())
    assert "FLEXPERT_INSTRUCTIONS  avx2" in doctor.describe(found)


def test_off_tells_the_mode_and_reads_the_system(facts, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: ("Fast", frozenset({"avx2", "fma", "avx512f"})))
    found = facts()
    assert {dtype for dtype, (backend, _) in kernels(found).items() if backend == "portable"} == set(
        kernels(found)
    )
    assert found["native"]["mode"] == "off"
    assert not found["native"]["live"]
    assert "FLEXPERT_NATIVE" in found["native"]["why_not"]
    assert found["processor"]["source"] == "/proc/cpuinfo"
    assert [name for name, has in found["processor"]["features"].items() if has] == ["avx2", "fma", "avx512f"]
    page = doctor.describe(found)
    assert "has              avx2, fma, avx512f\n" in page
    assert "lacks            avx512bw" in page
    assert "FLEXPERT_NATIVE        off" in page


def test_compiler_and_cache(facts, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FLEXPERT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = facts()
    assert found["native"]["compiler"] is None
    assert found["native"]["cache"] == str(tmp_path)
    assert not found["native"]["built"]
    page = doctor.describe(found)
    assert "no C++ compiler: CXX='no-such-compiler' is not a command" in page
    assert "not built; flexpert build makes it" in page
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    (tmp_path / "native").mkdir()
    library = native.target_path([str(script)])
    library.touch()
    assert not facts()["native"]["built"]
    seal(library, library.name)
    found = facts()
    assert found["native"]["built"]
    assert found["native"]["compiler"] == str(script)
    assert found["native"]["library"] in doctor.describe(found)


def test_a_system_that_tells_nothing(facts, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: ("arm", frozenset()))
    found = facts()
    assert set(found["processor"]["features"].values()) == {None}
    assert "unknown          avx2" in doctor.describe(found)
