"""Packed banks: the same layer in another layout, of which there is never a second copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flexpert import ConfigError, FlexpertError, InputError, MoE, MoEConfig, ops, prepack, unpack
from flexpert.experts import ExpertBatch, GLUExperts, MLPExperts
from flexpert.ops import packing
from flexpert.testing import assert_close, naive_moe
from tests.ops.cpu.conftest import found, threads  # noqa: F401

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _packs(found, monkeypatch):  # noqa: F811
    """Packing by whatever the processor has; the portable kernels run packed weights where it has nothing."""
    monkeypatch.setattr(packing, "native", lambda: found)
    if found.library is None or packing.why_not(torch.device("cpu"), BF16):
        monkeypatch.setattr(packing, "why_not", lambda device, dtype: None if dtype == BF16 else f"{dtype}")


def make_moe(**options):
    torch.manual_seed(0)
    config = {"model_dim": 40, "hidden_dim": 33, "num_experts": 4, "top_k": 2, "expert": "glu", **options}
    return MoE(MoEConfig(**config)).to(BF16).eval()


def tokens(count=20, dim=40):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(1)).to(BF16)


@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 2, 33, 17), (1, 5, 100), (4, 1, 1)])
def test_unpacking_gives_the_same_bits(shape):
    w = torch.randn(shape).to(BF16)
    packed = packing.pack(w)
    assert packed.shape == (*shape[:-2], -(-shape[-2] // 32), -(-shape[-1] // 32), 1024)
    assert torch.equal(packing.unpack(packed, *shape[-2:]).view(torch.int16), w.view(torch.int16))


OPTIONS = {
    "mlp": {"expert": "mlp", "activation": "gelu"},
    "glu": {"expert_bias": True, "output_dim": 50},
    "shared": {"num_shared_experts": 2, "shared_gate": True},
    "mixed": {"expert": [{"name": "mlp", "count": 2}, {"name": "glu", "count": 1}, "zero"]},
    "rows": {"combine": "weighted_input"},
    "dropout": {"expert": "mlp_dropout"},
    "soft": {"router": "soft"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_layers_compute_the_same(name):
    moe, x = make_moe(**OPTIONS[name]), tokens()
    x = x.view(2, 10, 40) if name == "soft" else x
    with torch.no_grad():
        before = moe(x)
        assert not any(prepack(moe).values())
        assert_close(moe(x), before, 4 * torch.finfo(BF16).eps)
        with ops.use_backend("reference"):
            assert_close(moe(x), before, 4 * torch.finfo(BF16).eps)
        unpack(moe)
        assert torch.equal(moe(x), before)


def test_the_loops_read_packed_layers():
    moe, x = make_moe(), tokens(6)
    want = naive_moe(moe, x).output
    prepack(moe)
    assert torch.equal(naive_moe(moe, x).output, want)


def test_there_is_one_copy_and_it_comes_back_in_place():
    moe = make_moe(expert_bias=True)
    moe.experts.w2.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    counts = moe.num_active_params(), moe.flops_per_token()
    assert prepack(moe) == {"experts": None}
    assert "packed" in repr(moe.experts)
    assert moe.experts.w1 is moe.experts.w2 is None
    assert sorted(dict(moe.named_parameters())) == ["experts.b1", "experts.b2", "router.weight"]
    assert (moe.num_active_params(), moe.flops_per_token()) == counts
    assert prepack(moe) == {"experts": None}  # nothing more to do
    unpack(moe)
    assert [name for name, _ in moe.named_parameters()] == list(before)
    assert not list(moe.experts.named_buffers())
    assert (moe.experts.w1.requires_grad, moe.experts.w2.requires_grad) == (True, False)
    assert all(torch.equal(p, before[name]) for name, p in moe.named_parameters())
    unpack(moe)  # nothing to do


def test_state_dict_has_the_layout_of_the_parameters():
    moe = make_moe(expert_bias=True)
    before = copy.deepcopy(moe.state_dict())
    prepack(moe)
    after = moe.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_packs_what_was_loaded(assign):
    moe, other, x = make_moe(), make_moe(), tokens()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.5)
    prepack(moe)
    moe.load_state_dict(other.state_dict(), assign=assign)
    assert moe.experts.is_packed
    with torch.no_grad():
        assert_close(moe(x), other(x), 4 * torch.finfo(BF16).eps)
    wide = {name: p.float() for name, p in other.state_dict().items()}
    moe.load_state_dict(wide)  # rounded into the dtype of the bank, as into parameters
    with pytest.raises(RuntimeError, match="cannot be packed again and are left unpacked"):
        moe.load_state_dict(wide, assign=True)
    assert moe.experts.w1.dtype == torch.float32


def test_loading_refuses_other_shapes_and_missing_weights():
    moe = make_moe()
    prepack(moe)
    with pytest.raises(RuntimeError, match=r"experts\.w1 has shape"):
        moe.load_state_dict(make_moe(hidden_dim=31).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.w2"):
        moe.load_state_dict({name: p for name, p in make_moe().state_dict().items() if "w2" not in name})
    assert moe.experts.is_packed


def test_copies_are_packed_and_apart():
    moe, x = make_moe(), tokens()
    prepack(moe)
    with torch.no_grad():
        want = moe(x)
        twin = copy.deepcopy(moe)
        moe.load_state_dict({name: p * 0 for name, p in moe.state_dict().items()})
        assert torch.equal(twin(x), want)
    assert twin.experts.is_packed


def test_what_packed_weights_cannot_do_is_refused():
    moe = make_moe()
    prepack(moe)
    with pytest.raises(ConfigError, match=r"call unpack\(\)"):
        moe.train()
    bank = moe.experts  # a conversion of the whole layer may reach other parts before it is refused
    for convert in (bank.float, lambda: bank.to("meta"), lambda: bank.to_empty(device="meta")):
        with pytest.raises(ConfigError, match=r"call unpack\(\)"):
            convert()
    moe.eval().to(BF16).cpu()
    x = tokens()
    with pytest.raises(InputError, match="packed in torch.bfloat16"):
        moe.experts(ExpertBatch(rows_ND=x.float(), counts_E=torch.tensor([20, 0, 0, 0]), unit_N=None))
    with pytest.raises(FlexpertError, match="no backward pass"):
        moe(x.requires_grad_()).sum().backward()


def test_training_mode_is_refused():
    moe = make_moe().train()
    with pytest.raises(ConfigError, match=r"call eval\(\)"):
        prepack(moe)


def test_what_cannot_be_packed_says_why():
    moe = make_moe().float()
    assert "float32" in prepack(moe)["experts"]
    moe.to(BF16)
    moe.experts.w1 = nn.Parameter(moe.experts.w1.data.to("meta"))
    assert moe.experts.prepack() is not None or packing.why_not(torch.device("meta"), BF16) is None
    twins = nn.ModuleList([make_moe(), make_moe()]).eval()
    twins[1].experts.w2 = twins[0].experts.w2
    assert set(prepack(twins).values()) == {"w2 is shared with another module"}
    twice = make_moe()
    assert prepack(nn.ModuleList([twice, twice])) == {"0.experts": None}
    bank = make_moe().experts
    nn.utils.parametrize.register_parametrization(bank, "w1", nn.Identity())
    assert "not a parameter of its own" in bank.prepack()


@pytest.mark.parametrize("kind", [MLPExperts, GLUExperts])
def test_new_parameters_replace_the_packed_weights(kind):
    """Whoever sets both parameters has an ordinary bank again; one alone is no bank."""
    bank = kind(num_experts=2, model_dim=32, hidden_dim=32).to(BF16).eval()
    new = copy.deepcopy(bank)
    bank.prepack()
    bank.w1 = nn.Parameter(new.w1.detach() * 2)
    assert not bank.is_packed
    with pytest.raises((AttributeError, TypeError)):
        bank.weights_in(BF16)
    bank.w2 = nn.Parameter(new.w2.detach())
    assert torch.equal(bank.weights_in(BF16)[0], new.w1 * 2)


def test_packed_layers_compile_and_export():
    moe, x = make_moe(), tokens()
    prepack(moe)
    with torch.no_grad():
        want = moe(x)
        assert torch.equal(torch.compile(moe, fullgraph=True, backend="aot_eager")(x), want)
        assert torch.equal(torch.export.export(moe, (x,)).module()(x), want)


def test_autocast_reaches_packed_experts():
    moe, x = make_moe(), tokens()
    prepack(moe)
    with torch.no_grad():
        want = moe(x)
        moe.router.float()
        with torch.autocast("cpu", BF16):
            got = moe(x.float())
    assert got.dtype == torch.float32
    assert_close(got, want.float(), 4 * torch.finfo(BF16).eps)
