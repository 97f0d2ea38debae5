"""Ranks that train a layer under a tuner, with clocks that are told what a step took."""

from __future__ import annotations

import json
import math
import random

import torch
import torch.distributed as dist

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.parallel import expert_mesh, parallelize
from flexpert.tune import Limits, PlanLog, Tuner, TunerSettings, attach

D = 8


class Clock:
    """Seconds that go by only when a test says so, from an own start and at an own speed on each rank."""

    def __init__(self, rank):
        self.now, self.speed = 1000.0 * rank, 1.0 + 0.05 * rank
        self.random = random.Random(rank)  # of this rank alone: no two ranks measure the same

    def __call__(self):
        return self.now

    def spend(self, seconds, noise=0.03):
        self.now += seconds * self.speed * math.exp(self.random.gauss(0, noise))


def truth(plan, scale=1.0, fast="auto"):
    """Seconds that a step with this plan takes, of whose kernels one is fast."""
    place = {0: 2.0, 1: 1.0, 2: 1.3}[plan.r]
    chunks = 1 + 0.1 * abs(plan.degree - 2)
    kernel = 1.0 if plan.kernel == fast else 1.3
    return scale * place * chunks * kernel * (1.05 if plan.capacity == "padded" else 1.0)


def wrong_cost(shape, plan, workload):
    """A model that errs: it holds degree 1 and r = 2 for the best."""
    return truth(plan) * (0.7 if plan.r == 2 else 1.0) * (0.8 if plan.degree == 1 else 1.0)


def make_model(seed=0, layers=1):
    torch.manual_seed(seed)
    config = MoEConfig(model_dim=D, hidden_dim=8, num_experts=2, top_k=1)
    model = torch.nn.Sequential(*(MoE(config) for _ in range(layers)))
    mesh = expert_mesh(2, heartbeat=0)
    parallelize(model, mesh, plan="auto")
    return model, mesh


def make_tuner(path=None, cost=wrong_cost, **settings):
    rank = dist.get_rank()
    log = PlanLog(path) if path is not None and rank == 0 else None
    settings = {"rows_per_bucket": 16, "share": 0.5, **settings}
    return Tuner(cost, TunerSettings(**settings), clock=Clock(rank), log=log)


def step(model, tuner, tokens=20, number=None, scale=1.0, fast="auto", **options):
    """One step; the plan that ran."""
    rank = dist.get_rank()
    with tuner.step(number):
        x = torch.randn(tokens + rank, D)  # unequal numbers: what a rank has does not decide
        for layer in model:
            x = layer(x, **options)
        x.sum().backward()
        tuner._clock.spend(sum(truth(plan, scale, fast) for plan in tuner.plans.values()))
    model.zero_grad()
    return next(iter(tuner.plans.values()))


def run(steps, tokens=(20,), layers=1, path=None, dictionary=None, scale=None, **settings):
    """Train so many steps: (plans, report, state, seconds of the last step's plan)."""
    model, _ = make_model(layers=layers)
    tuner = make_tuner(path, **settings)
    attach(model, tuner, dictionary=dictionary)
    scale = scale or (lambda i: 1.0)
    plans = [step(model, tuner, tokens[i * len(tokens) // steps], scale=scale(i)) for i in range(steps)]
    if dictionary is not None and dist.get_rank() == 0:
        tuner.save(dictionary)
    if path is not None and tuner.log is not None:
        tuner.log.flush()
    return [plan.encode() for plan in plans], tuner.report(), tuner.state_dict()


def slowed(i):
    """Links that become slow at step 120: what is best changes no more, but all takes twice as long."""
    return 2.0 if i >= 120 else 1.0


def drifting(steps):
    return run(steps, scale=slowed)


def limited(steps, trials, worst):
    return run(steps, limits=Limits(trials=trials, worst=worst), share=0.1, burst=3)


def without_tuner():
    model, _ = make_model()
    message = ""
    try:
        model(torch.randn(4, D))
    except Exception as error:  # noqa: BLE001 - looked at by the test
        message = f"{type(error).__name__}: {error}"
    from flexpert.parallel import ExecutionPlan

    forced = model[0](torch.randn(4, D), plan=ExecutionPlan(r=2))
    return message, tuple(forced.shape)


def resumed(path, first, again):
    """A run that is interrupted after `first` steps, goes on from there, and one that replays it."""
    model, _ = make_model()
    tuner = make_tuner(path)
    attach(model, tuner)
    for _ in range(first):
        step(model, tuner)
    state = tuner.state_dict()
    lost = [step(model, tuner) for _ in range(again)]
    if tuner.log is not None:
        tuner.log.flush()
    dist.barrier()
    model, _ = make_model()
    tuner = make_tuner(path)
    attach(model, tuner)
    tuner.load_state_dict(state)
    found = [tuner.log.rewind(first) if tuner.log is not None else None]
    dist.broadcast_object_list(found, src=0)
    tuner.replay = found[0]
    repeated = [step(model, tuner) for _ in range(again + 2)]
    return lost == repeated[:again], len(repeated), tuner.steps


def raced(path, steps=70, again=10):
    """A run on ranks where "recompute" is fast; its last steps from the log; steps with fixed plans."""
    model, _ = make_model()
    tuner = make_tuner(path, rows_per_bucket=1000)
    attach(model, tuner)
    plans = [step(model, tuner, 100, fast="recompute") for _ in range(steps)]
    state = json.loads(json.dumps(tuner.state_dict()))
    found = [None if tuner.log is None else (tuner.log.flush(), tuner.log.rewind(steps - again))[1]]
    dist.broadcast_object_list(found, src=0)
    model, _ = make_model()
    repeating = make_tuner(rows_per_bucket=1000)
    attach(model, repeating)
    repeating.replay = found[0]
    repeated = [step(model, repeating, 100, number=i) for i in range(steps - again, steps)]
    model, _ = make_model()
    fixed = make_tuner(deterministic=True, rows_per_bucket=1000)
    attach(model, fixed)
    fixed.load_state_dict(state)
    then = [step(model, fixed, 100).encode() for _ in range(3)]
    return [plan.encode() for plan in plans], tuner.report(), repeated == plans[-again:], then


def deterministic(steps, interrupted, path):
    """Plans of a run with fixed plans, of an interrupted and resumed one, and the number of trials.

    Before it is resumed, another run learns better plans and keeps them where the resumed one looks.
    """
    tokens = [20, 20, 60, 60, 20, 100, 100, 20]

    def go(model, tuner, places):
        return [step(model, tuner, tokens[i % len(tokens)]).encode() for i in places]

    model, _ = make_model()
    tuner = make_tuner(deterministic=True)
    attach(model, tuner)
    whole = go(model, tuner, range(steps))
    model, _ = make_model()
    tuner = make_tuner(deterministic=True)
    attach(model, tuner)
    parts = go(model, tuner, range(interrupted))
    state = tuner.state_dict()
    run(70, dictionary=path)
    dist.barrier()
    model, _ = make_model()
    tuner = make_tuner(deterministic=True)
    attach(model, tuner, dictionary=path)
    learnt = set(tuner.dictionary.entries)
    tuner.load_state_dict(state)
    assert learnt & set(tuner.dictionary.entries)  # what it learnt is of a load that the run meets
    parts += go(model, tuner, range(interrupted, steps))
    return whole, parts, tuner.trials


def scopes():
    """Plans are chosen in a scope, by argument, and static ones win."""
    from flexpert import routing_scope
    from flexpert.parallel import ExecutionPlan

    model, _ = make_model()
    transport = model[0].transport
    ran = []
    check = transport.check
    tuner = make_tuner()
    attach(model, tuner)
    transport.check = lambda plan, experts: (ran.append(plan), check(plan, experts))[1]
    x = torch.randn(6, D)
    static = ExecutionPlan(r=0)
    transport.plan = static
    with tuner.step():
        model[0](x)
        model[0](x, plan="auto")
        with routing_scope(model, plan="auto", context=RoutingContext()):
            model[0](x)
            model[0](x, plan=static)
        with routing_scope(model, plan=static):
            model[0](x, plan="auto")
            model[0](x)
    return [plan == static for plan in ran]


def warned(path):
    """Read a dictionary with the first rank, whose warning the caller is to see."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(2, dictionary=None)
        model, _ = make_model()
        attach(model, make_tuner(), dictionary=path)
    return [str(w.message) for w in caught if "dictionary" in str(w.message)]
