"""`flexpert plan`: the best parallel plan of a model on a cluster, and what would change it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flexpert.core.config import require_int
from flexpert.core.files import check_writable

from .simulate import add_job_arguments, job

NAME = "plan"
HELP = "Recommend meshes, r, degree, all-to-all, micro-batch and checkpointing for a model on a cluster."
EXAMPLES = (
    "flexpert plan --model mixtral-8x7b --cluster a100-ndv4:nodes=8 --batch 512",
    "flexpert plan --model swinv2-moe-base --cluster a100-ndv4:nodes=4 --batch 4096 --no-sensitivity",
    "flexpert plan --model layer:num_experts=64 --cluster lab.yaml --batch 131072 --traffic zipf --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the cluster and the batch; how much is shown."""
    add_job_arguments(parser)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="plans shown (10)")
    parser.add_argument(
        "--no-sensitivity", dest="sensitivity", action="store_false", help="skip what would change the answer"
    )
    parser.add_argument(
        "--map", type=Path, metavar="FILE", help="draw which plan is best by tokens and parameters, as PNG"
    )
    parser.add_argument(
        "--scaling", type=Path, metavar="FILE", help="draw samples per second by number of nodes, as PNG"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Search; the ranked plans, those that do not fit, and the sensitivity."""
    from flexpert.monitor.plots import pyplot
    from flexpert.simulate import recommend
    from flexpert.simulate.output import meshes

    require_int("top", options.top, least=1)
    model, cluster, traffic = job(options)
    pictures = [path for path in (options.map, options.scaling) if path is not None]
    for path in pictures:
        check_writable(path)
    if pictures:
        pyplot()
    found = recommend(model, cluster, options.batch, traffic=traffic, sensitivity=options.sensitivity)
    files: list[str] = []
    if options.map is not None:
        from flexpert.simulate.plan_map import draw

        draw(cluster, options.map)
        files.append(str(options.map))
    if options.scaling is not None:
        from flexpert.simulate import scaling_curve

        scaling_curve.draw(model, cluster, options.batch, options.scaling, traffic)
        files.append(str(options.scaling))
    return {
        "model": model.name,
        "cluster": cluster.name,
        "ranks": cluster.ranks,
        "batch": options.batch,
        "sample": model.sample,
        **found.to_dict(options.top),
        "meshes": meshes(model, cluster, found.best.plan),
        "files": files,
    }


def describe(result: dict[str, Any]) -> str:
    """The ranked table and the rest in lines."""
    from flexpert.simulate.output import plan_text

    return plan_text(result)
