"""Cases for operator tests: routed inputs of any shape, and the error by which results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from flexpert import ops

# Half dtypes: the longest chain (pre-activation, hidden, its gradient, its pre-activation's gradient, ...)
# rounds six times by at most eps / 2 each. The others: sums of up to 10^2 terms, with room for cancellation.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 3 * torch.finfo(torch.float16).eps,
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in Frobenius norm; |got| where want is zero."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if want.any() else 1.0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of `grouped_mlp`, rows past `counts_E.sum()` included; and of its parts."""

    x_TD: Tensor
    unit_N: Tensor
    weight_N: Tensor | None
    counts_E: Tensor
    slot_E: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str

    @property
    def args(self) -> tuple[object, ...]:
        return tuple(vars(self).values())

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    @property
    def total(self) -> int:
        return int(self.counts_E.sum())

    def double(self) -> Case:
        """The same values in float64, with gradients of their own."""
        wide = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}
        return replace(self, **wide)


def build_case(
    tokens: int = 7,
    model_dim: int = 17,
    hidden_dim: int = 33,
    output_dim: int | None = None,
    counts: tuple[int, ...] = (3, 0, 5, 1),
    spare: int = 0,
    gated: bool = False,
    biases: bool | str = True,
    weighted: bool = True,
    slots: tuple[int, ...] | None = None,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Random values; `spare` rows past the total point at token 0. `biases` may name the only one."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return value.to(dtype).requires_grad_()

    total, out = sum(counts), model_dim if output_dim is None else output_dim
    num_slots = len(counts) if slots is None else max(0, *slots) + 1
    unit = torch.randint(max(tokens, 1), (total,), generator=generator)
    weight = torch.rand(total + spare, generator=generator, dtype=torch.float64) + 0.1
    inner = (2, hidden_dim) if gated else (hidden_dim,)
    return Case(
        x_TD=leaf(tokens, model_dim),
        unit_N=torch.cat([unit, unit.new_zeros(spare)]),
        weight_N=weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_() if weighted else None,
        counts_E=torch.tensor(counts, dtype=torch.int64),
        slot_E=None if slots is None else torch.tensor(slots),
        w1=leaf(num_slots, *inner, model_dim, scale=model_dim**-0.5),
        b1=leaf(num_slots, *inner) if biases in (True, "b1") else None,
        w2=leaf(num_slots, out, hidden_dim, scale=hidden_dim**-0.5),
        b2=leaf(num_slots, out) if biases in (True, "b2") else None,
        activation=activation,
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory that PyTorch hands out uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return build_case


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """assert_same(got_fn, want_fn, got_leaves, want_leaves): outputs and every gradient agree.

    The functions return one tensor; the same random gradient flows back through both, given leaves. `want` is
    float64.
    """

    def check(
        got_fn: Callable[[], Tensor],
        want_fn: Callable[[], Tensor],
        got_leaves: dict[str, Tensor],
        want_leaves: dict[str, Tensor],
    ) -> None:
        got, want = got_fn(), want_fn()
        tolerance = TOLERANCE[got.dtype]
        assert relative_error(got, want) <= tolerance, "output"
        if not got_leaves:
            return
        grad = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        grad = grad.to(got.dtype)
        got_grads = torch.autograd.grad(got, list(got_leaves.values()), grad, allow_unused=True)
        want_grads = torch.autograd.grad(
            want, list(want_leaves.values()), grad.double(), allow_unused=True, materialize_grads=True
        )
        for name, mine, true in zip(got_leaves, got_grads, want_grads, strict=True):
            assert mine is not None, f"no gradient for {name}"
            assert mine.dtype == got_leaves[name].dtype, name
            assert relative_error(mine, true) <= tolerance, f"gradient of {name}"

    return check


@pytest.fixture
def assert_recomputes() -> Callable[..., None]:
    """assert_recomputes(case, call): with `recompute` all bits are the same, and only arguments are kept.

    `call` takes arguments and `recompute` of `ops.grouped_mlp`, which it is by default.
    """

    def check(case: Case, call: Callable[..., Tensor] = ops.grouped_mlp) -> None:
        given = {value.data_ptr() for value in vars(case).values() if torch.is_tensor(value)}
        results, kept = [], []
        for recompute in (False, True):
            saved: list[Tensor] = []
            with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = call(*case.args, recompute=recompute)
            kept.append(sum(t.numel() for t in saved if t.data_ptr() not in given))
            dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            leaves = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
            results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
        rows = len(case.unit_N) + ops.products.slack(case.x_TD.dtype)
        assert kept == [rows * case.w1[0, ..., 0].numel(), 0]
        for name, one, other in zip(["y", *case.leaves], *results, strict=False):
            assert torch.equal(one, other), name

    return check
