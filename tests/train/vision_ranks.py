"""The training job on ranks; run by name, and without ranks as the reference."""

from __future__ import annotations

import gzip
import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from flexpert.core.errors import ConfigError, DistributedError
from flexpert.train import data
from flexpert.train.config import load_config
from flexpert.train.job import train
from flexpert.train.parallel import join
from flexpert.train.task import StepResult
from flexpert.train.vision import VisionTask

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"


def publish(folder):
    """Let a folder's images pass for the published ones."""
    for file in Path(folder).glob("*.gz"):
        content = gzip.decompress(file.read_bytes())
        shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3]))
        data.FILES[file.stem] = data.IdxFile(shape, hashlib.sha256(content).hexdigest())


@contextmanager
def place(folder):
    """The environment that torchrun sets, and a folder's images as if they were the published ones."""
    names = {}
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    published = dict(data.FILES)
    publish(folder)
    os.environ.update(names)
    try:
        yield
    finally:
        data.FILES.clear()
        data.FILES.update(published)
        for name in names:
            del os.environ[name]


def run(folder, settings, resume=False):
    """The whole job; what it returns."""
    with place(folder):
        return train(load_config(CONFIG, settings), resume=resume)


def run_with_cache(folder, settings, cache, resume=False):
    """The whole job, with another cache folder."""
    os.environ["FLEXPERT_CACHE"] = cache
    try:
        return run(folder, settings, resume)
    finally:
        del os.environ["FLEXPERT_CACHE"]


@contextmanager
def started(folder, settings):
    """Task and ranks before the first step."""
    config = load_config(CONFIG, settings)
    with place(folder), join(config) as ranks:
        torch.manual_seed(0)
        task = VisionTask(config, ranks=ranks)
        ranks.prepare(task.model)
        yield task, ranks


def step(folder, settings):
    """Figures, gradients (whole, of rank 0) and their norm of step 4."""
    with started(folder, settings) as (task, ranks):
        task.model.train()
        parts = task.config.optimizer.accumulate
        results = []
        for part in range(parts):
            with ranks.micro_batch(task.model, last=part == parts - 1):
                results.append(task.loss(4, part, parts))
                results[-1].loss.backward()
        gradients = {}
        for name, parameter in task.model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                gradients[name] = whole.clone()
        norm = ranks.clip_grad_norm(task.model, 1e-3)
        return ranks.figures(StepResult.merged(results)), gradients, float(norm)


def measure(folder, settings, batch_size):
    """Evaluation and load before the first step."""
    with started(folder, settings) as (task, _):
        task.evaluation_batch = batch_size
        return task.evaluate(), task.load()


def decide(texts):
    """What rank 0 decides, for each text, and what ranks raise when it fails."""
    nobody = load_config(CONFIG, ["device=cpu"])
    with place("."), join(nobody) as ranks:
        main = ranks.world.is_main
        seen = [ranks.from_main(lambda text=text: text if main else "not asked") for text in texts]

        def fail():
            raise ConfigError("no such run")

        try:
            ranks.from_main(fail)
        except ConfigError as error:
            return seen, type(error).__name__, str(error)
    return None


def draw():
    """Random numbers of the steps 0 and 1."""
    with place("."), join(load_config(CONFIG, ["device=cpu"])) as ranks:
        values = []
        for number in (0, 1):
            ranks.seed(7, number)
            values.append(float(torch.rand(())))
        return values


def agree(cases):
    """What this rank says to settings of all ranks, case by case; "" where it joins the others."""
    rank, told = dist.get_rank(), []
    for settings in cases:
        config = load_config(CONFIG, ["device=cpu", f"output=runs-{rank}", *settings[rank]])
        try:
            with place("."), join(config):
                told.append("")
        except DistributedError as error:
            told.append(str(error))
    return told
