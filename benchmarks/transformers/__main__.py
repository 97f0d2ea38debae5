"""Tokens per second of whole models with each experts implementation, in training and in decoding.

    python -m benchmarks.transformers [--rounds 3] [--models OLMoE-like ...] [--output FOLDER]

All implementations of one row run in turns within one process, on the same model and input; figures are
medians over the rounds, of which one that takes seconds gets a single one. `no experts` is the model without
any: what is left to win. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from flexpert.bench.machine import machine_facts
from flexpert.integrations.transformers import enable, prepack

from .models import SHAPES, VOCABULARY, make

TRAINED = ("eager", "grouped_mm", "batched_mm", "flexpert", "no experts")
DECODED = ("eager", "batched_mm", "grouped_mm", "flexpert", "flexpert, prepacked", "no experts")
BUILT_IN = ("eager", "batched_mm", "grouped_mm")
# batched_mm copies the weights of every choice, which for 512 tokens is more memory than this machine has.
TOKENS = {"batched_mm": 32}
CASES = [
    ("training step", torch.float32, 512),
    ("training step", torch.bfloat16, 512),
    ("decode, 1 sequence", torch.float32, 1),
    ("decode, 1 sequence", torch.bfloat16, 1),
    ("decode, 8 sequences", torch.bfloat16, 8),
]
DECODE_STEPS = 8
SLOW = 2.0  # seconds of a first run that is the only one
Run = Callable[[], float]


def _without_experts(_: nn.Module, hidden: torch.Tensor, *__: Any) -> torch.Tensor:
    return hidden


def _use(model: Any, implementation: str) -> None:
    model.set_experts_implementation(implementation.partition(",")[0])


def training_run(model: Any, implementation: str, tokens: int) -> Run:
    """Seconds of one step: forward with loss, backward, plain SGD."""
    ids = torch.randint(VOCABULARY, (max(tokens // 256, 1), min(tokens, 256)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def run() -> float:
        _use(model, implementation)
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return run


def decoding_run(model: Any, implementation: str, sequences: int) -> Run:
    """Seconds of one step of greedy decoding after a prompt of 32 tokens; the mean of some steps."""
    prompt = torch.randint(VOCABULARY, (sequences, 32))

    @torch.no_grad()
    def run() -> float:
        _use(model, implementation)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODE_STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - start) / DECODE_STEPS

    return run


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model."""
    rows = []
    for dtype, cases in itertools.groupby(sorted(CASES, key=lambda case: str(case[1])), lambda case: case[1]):
        model = make(name).to(dtype)
        for case, _, tokens in cases:
            training = case.startswith("training")
            model.train(training)
            runs = {}
            for implementation in TRAINED if training else DECODED:
                subject = model
                if implementation.endswith("prepacked"):
                    subject = copy.deepcopy(model)
                    if any(reason is not None for reason in prepack(subject).values()):
                        continue
                own = TOKENS.get(implementation, tokens) if training else tokens
                make_run = training_run if training else decoding_run
                runs[implementation] = own, make_run(subject, implementation, own)
            rows.append(_row(name, case, dtype, runs, rounds))
            print(_line(rows[-1]), file=sys.stderr)
        del model, subject, runs
        gc.collect()
    return rows


def _row(
    name: str, case: str, dtype: torch.dtype, runs: dict[str, tuple[int, Run]], rounds: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {implementation: [] for implementation in runs}
    first = {implementation: run() for implementation, (_, run) in runs.items()}
    for number in range(rounds):
        for implementation, (_, run) in runs.items():
            if first[implementation] < SLOW:
                seconds[implementation].append(run())
            elif number == 0:
                seconds[implementation].append(first[implementation])
    rates = {
        implementation: sorted(tokens / value for value in seconds[implementation])
        for implementation, (tokens, _) in runs.items()
    }
    return {
        "model": name,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": {implementation: tokens for implementation, (tokens, _) in runs.items()},
        "tokens_per_second": {key: statistics.median(values) for key, values in rates.items()},
        "all": rates,
    }


def _line(row: dict[str, Any]) -> str:
    rates = ", ".join(f"{key} {value:.0f}" for key, value in row["tokens_per_second"].items())
    return f"{row['model']}, {row['case']}, {row['dtype']}: {rates}"


def table(rows: list[dict[str, Any]]) -> str:
    """Medians as Markdown, with the gain over the fastest built-in implementation."""
    lines = [
        f"| model | case | dtype | {' | '.join(DECODED)} | gain |",
        f"|---|---|---|{'---:|' * (len(DECODED) + 1)}",
    ]
    for row in rows:
        rates = row["tokens_per_second"]
        cells = [f"{rates[key]:.0f}" if key in rates else "" for key in DECODED]
        gain = rates["flexpert"] / max(rates[key] for key in BUILT_IN)
        head = f"| {row['model']} | {row['case']} | {row['dtype']} | "
        lines.append(head + " | ".join([*cells, f"{gain:.2f}x |"]))
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The whole page."""
    return (
        f"Tokens per second, medians of {facts['rounds']} rounds in turns, on {facts['cpu']} with "
        f"{facts['threads']} threads, PyTorch {facts['torch']}, transformers {facts['transformers']}. "
        f"Models: 2 layers, D 512; 8 experts of F 1792, top-2; 64 of F 256, top-8; 128 of F 192, top-8.\n\n"
        f"{table(rows)}\n\n"
        f"Training is forward, backward and SGD on 512 tokens (batched_mm: 32, as it copies the weights of "
        f"every choice; a step of more than {SLOW:.0f} s is measured once); decoding is one step with a KV "
        f"cache. `gain` is flexpert over the fastest of {', '.join(BUILT_IN)}; `no experts` is the same "
        f"model without its experts.\n"
    )


def main() -> None:
    """Run, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    enable()
    transformers.integrations.moe.ExpertsInterface.register("no experts", _without_experts)
    start = time.perf_counter()
    rows = [row for name in options.models for row in measure(name, options.rounds)]
    facts = {**machine_facts(), "transformers": transformers.__version__, "rounds": options.rounds}
    facts |= {"command": "python -m benchmarks.transformers", "seconds": round(time.perf_counter() - start)}
    options.output.mkdir(exist_ok=True)
    data = json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n"
    (options.output / "results.json").write_text(data, encoding="utf-8")
    text = report(rows, facts)
    (options.output / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
