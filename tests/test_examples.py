from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FETCHES = "upcycle_smollm2.py"  # a model of 93 MB
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != FETCHES)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_example_that_fetches_a_model_on_a_small_one() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    example = runpy.run_path(str(ROOT / "examples" / FETCHES))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=40))
    text = torch.arange(1, 400) % 40  # each token tells the next
    windows = text[: 24 * 16].view(24, 16)
    bottom, top = example["split"](model, 2)
    train, test = (example["windows_of"](bottom, part) for part in (windows, windows[:4]))
    with torch.no_grad():
        logits = model(input_ids=windows[:4, :-1]).logits.flatten(0, 1)
        want = torch.nn.functional.cross_entropy(logits, windows[:4, 1:].flatten())
    rows = example["compare"](top, example["METHODS"], train, test, test, 6)
    for row in rows:  # exact starts, from which training goes on
        assert row["start"] == pytest.approx(float(want), rel=1e-5)
        assert row["tuned"] < row["start"] - 0.01
        assert row["rate"] == min(row["choice"], key=row["choice"].get)
    assert rows[0]["difference"] == 0
    assert len(example["table"](rows, 1000).splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_code_in_pages_runs(page: str) -> None:
    before = dict(os.environ)
    try:
        for block in python_blocks(page):
            exec(compile(block, page, "exec"), {"__name__": page})
    finally:  # a page may tell of a world of one; later tests are in none
        os.environ.clear()
        os.environ.update(before)
