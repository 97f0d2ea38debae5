"""`flexpert simulate`: a training step on a cluster that is not at hand, or rows of the Tutel paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flexpert.core.errors import ConfigError
from flexpert.core.files import check_writable

NAME = "simulate"
HELP = "Predict a training step on a cluster: time by phase, memory, bottleneck; or a paper's tables."
EXAMPLES = (
    "flexpert simulate --model layer:model_dim=2048,hidden_dim=2048,num_experts=128 "
    "--cluster a100-ndv4:nodes=8 --batch 1048576 --plan r=1,degree=2",
    "flexpert simulate --model mixtral-8x7b --cluster a100-ndv4:nodes=8,slow_link=3@0.5 --batch 64 "
    "--plan replicas=8,dense_shards=64 --traffic zipf:skew=0.5 --timeline step.json",
    "flexpert simulate --model swinv2-moe-base --cluster lab.yaml --batch 4096 --plan degree=2 --json",
    "flexpert simulate --paper T2",
    "flexpert simulate --paper F14 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the cluster, the batch and the plan; what is written; or a row of the paper."""
    add_job_arguments(parser)
    parser.add_argument(
        "--plan",
        default="r=1",
        metavar="KEY=VALUE,...",
        help="of r, degree, algorithm, capacity, codec, replicas, slices, dense_shards, micro_batch, "
        "checkpointing (r=1)",
    )
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which step of drifting traffic (0)")
    parser.add_argument("--no-backward", dest="backward", action="store_false", help="a forward pass alone")
    parser.add_argument(
        "--timeline", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev, as JSON"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", metavar="RANK", help="of the timeline (the first and the slowest)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline as PNG")
    parser.add_argument("--paper", metavar="ROW", help="of arXiv 2206.03382: T2, T5, T6a, T6b, F12, F14, F18")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What `simulate` and `plan` have in common."""
    parser.add_argument(
        "--model", metavar="NAME[:KEY=VALUE,...]", help="a preset with settings, or a YAML or JSON file"
    )
    parser.add_argument(
        "--cluster", metavar="NAME[:KEY=VALUE,...]", help="a preset with settings, or a YAML or JSON file"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="samples of all ranks in a step")
    parser.add_argument(
        "--traffic", default="uniform", metavar="KIND", help="uniform, zipf:skew=1, trace:PATH (uniform)"
    )


def job(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, cluster and traffic of the options.

    Raises:
        ConfigError: one is missing or bad; the message names it.
    """
    from flexpert.simulate.cluster import Cluster
    from flexpert.simulate.models import parse_model
    from flexpert.simulate.traffic import parse_traffic

    for name in ("model", "cluster", "batch"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing; see flexpert {options.command} --help")
    return parse_model(options.model), Cluster.parse(options.cluster), parse_traffic(options.traffic)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Simulate; the step, or the rows of the paper."""
    if options.paper is not None:
        from flexpert.simulate.paper import reproduce

        return reproduce(options.paper)
    from flexpert.simulate import JobPlan, simulate
    from flexpert.simulate.output import write_timeline

    model, cluster, traffic = job(options)
    plan = JobPlan.parse(options.plan)
    _check_output(options)
    step = simulate(
        model, cluster, options.batch, plan, traffic=traffic, step=options.step, backward=options.backward
    )
    files = []
    if options.timeline or options.plot:
        ranks = options.ranks or sorted({0, step.rank})
        step = simulate(
            model, cluster, options.batch, plan, traffic=traffic, step=options.step,
            backward=options.backward, watch=ranks,
        )  # fmt: skip
        files = write_timeline(step, options.timeline, options.plot)
    return {
        "model": model.name,
        "params": model.params,
        "cluster": cluster.name,
        "ranks": cluster.ranks,
        "batch": options.batch,
        "sample": model.sample,
        "plan": plan.to_dict(),
        **step.to_dict(),
        "files": files,
    }


def _check_output(options: argparse.Namespace) -> None:
    """Refuse what cannot be written, before anything is simulated."""
    from flexpert.monitor.plots import pyplot

    for path in filter(None, (options.timeline, options.plot)):
        check_writable(path)
    if options.plot:
        pyplot()
    if options.ranks and not (options.timeline or options.plot):
        raise ConfigError(f"--ranks {options.ranks[0]} ...: of which timeline? give --timeline or --plot too")


def describe(result: dict[str, Any]) -> str:
    """The step, or the table."""
    if "rows" in result:
        from flexpert.simulate.output import paper_table

        return paper_table(result)
    from flexpert.simulate.output import step_text

    return step_text(result)
