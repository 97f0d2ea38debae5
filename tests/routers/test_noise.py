"""Counter-based noise: reproducible, independent of order, of the right distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flexpert import MoE, MoEConfig, RoutingContext
from flexpert.routers import noise
from flexpert.testing import assert_close

WORD = 2**64


def signed(value):
    value %= WORD
    return value - WORD if value >= WORD // 2 else value


def mix_in_whole_numbers(z):
    """SplitMix64's finaliser after its increment, in Python's integers."""
    z = z * 0x9E3779B97F4A7C15 % WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


def unmix(z):
    """The inverse of `mix_in_whole_numbers`."""

    def unshift(value, bits):
        result = value
        for _ in range(64 // bits + 1):
            result = value ^ result >> bits
        return result

    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, WORD) % WORD
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD
    return unshift(z, 30) * pow(0x9E3779B97F4A7C15, -1, WORD) % WORD


def test_mix_is_the_published_function():
    values = [0, 1, 2, 12345, -1, -(2**63), 2**63 - 1, 987654321987654321]
    assert noise.mix(torch.tensor(values)).tolist() == [
        signed(mix_in_whole_numbers(v % WORD)) for v in values
    ]
    assert [unmix(mix_in_whole_numbers(v % WORD)) for v in values] == [v % WORD for v in values]


def test_uniform_never_reaches_its_ends():
    for hashed in (0, WORD - 1):  # the least and the greatest value there can be
        counter = torch.tensor(signed(unmix(unmix(hashed))))
        value = noise.uniform(torch.tensor(0), counter)
        assert 0 < value < 1
        assert noise.normal(torch.tensor(0), torch.arange(3)).isfinite().all()


def test_uniform_is_its_formula_in_whole_numbers():
    key, counters = 987654321, [0, 1, 2, 12345, 2**40]
    want = [((mix_in_whole_numbers(mix_in_whole_numbers(c) + key) >> 41) + 0.5) / 2**23 for c in counters]
    assert noise.uniform(torch.tensor(key), torch.tensor(counters)).tolist() == want


def test_neighbouring_keys_give_no_shifted_streams():
    one, next_one = (noise.uniform(torch.tensor(key), torch.arange(1000)) for key in (8, 9))
    assert not torch.isin(one, next_one).sum() > 5  # values of 23 bits may meet by chance


def test_uniform_is_uniform():
    u = noise.uniform(torch.tensor(7), noise.counters(1000, 100, torch.device("cpu"))).double()
    assert u.dtype == torch.float64
    counts = torch.histc(u, 50, 0, 1)
    chi_square = ((counts - 2000).square() / 2000).sum()
    assert chi_square < 49 + 5 * math.sqrt(2 * 49)
    assert abs(torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten()]))[0, 1]) < 5 / math.sqrt(1e5)
    other = noise.uniform(torch.tensor(8), noise.counters(1000, 100, torch.device("cpu"))).double()
    assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 5 / math.sqrt(1e5)


def test_normal_is_normal():
    z = noise.normal(torch.tensor(3), torch.arange(100_000)).double().sort().values
    cdf = torch.special.ndtr(z)
    empirical = (torch.arange(len(z)) + 0.5) / len(z)
    assert (cdf - empirical).abs().max() < 2 / math.sqrt(len(z))  # Kolmogorov and Smirnov
    assert z.isfinite().all()


def test_a_value_depends_on_its_counter_alone():
    key = torch.tensor(5)
    whole = noise.normal(key, torch.arange(100))
    assert torch.equal(noise.normal(key, torch.arange(40, 60)), whole[40:60])


def test_key_of_a_step():
    cpu = torch.device("cpu")
    key = noise.call_key(RoutingContext(step=3), 11, cpu)
    assert torch.equal(key, noise.call_key(RoutingContext(step=torch.tensor(3)), 11, cpu))
    assert key != noise.call_key(RoutingContext(step=4), 11, cpu)
    assert key != noise.call_key(RoutingContext(step=3), 12, cpu)
    before = torch.get_rng_state()
    noise.call_key(RoutingContext(step=3), 11, cpu)
    assert torch.equal(before, torch.get_rng_state())


def test_key_of_a_generator():
    cpu = torch.device("cpu")
    contexts = [RoutingContext(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    keys = [int(noise.call_key(context, 11, cpu)) for context in contexts]
    assert keys[0] == keys[1] != keys[2]
    assert int(noise.call_key(contexts[0], 11, cpu)) != keys[0]  # the generator moved on
    torch.manual_seed(0)
    drawn = [int(noise.call_key(RoutingContext(), 11, cpu)) for _ in range(2)]
    torch.manual_seed(0)
    assert drawn == [int(noise.call_key(RoutingContext(), 11, cpu)) for _ in range(2)]
    assert drawn[0] != drawn[1]


NOISES = {
    "gate_noise": {"gate_noise": 4.0},
    "learned_noise": {"learned_noise": True},
    "input_jitter": {"input_jitter": 0.5},
    "jitter_and_gate_noise": {"gate_noise": 2.0, "input_jitter": 0.3},
    "random": {"selection": "random"},
    "balanced": {"selection": "balanced"},
}


@pytest.mark.parametrize("shape", [(9, 5), (9, 2, 3), (9,)])
@pytest.mark.parametrize("cuts", [(0, 3, 6, 9), (0, 5, 5, 6, 9), (0, 0, 8, 9)], ids=str)
@pytest.mark.parametrize("options", NOISES.values(), ids=NOISES)
def test_parts_of_a_batch_get_the_noise_of_the_whole(options, cuts, shape):
    torch.manual_seed(0)
    router = {"name": "linear", **options}
    moe = MoE(MoEConfig(model_dim=7, hidden_dim=4, num_experts=7, top_k=2, router=router)).double()
    x = torch.randn(*shape, 7, dtype=torch.float64)
    whole = moe(x, context=RoutingContext(step=11), return_info=True)[1].routing
    parts, apart = [], []
    for first, end in itertools.pairwise(cuts):
        for samples, kept in (((first, end), parts), (None, apart)):
            context = RoutingContext(step=11, samples=samples)
            kept.append(moe(x[first:end], context=context, return_info=True)[1].routing)
    for name in ("logits_TE", "probs_TE"):
        assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.aux["ids_TK"] for part in parts]), whole.aux["ids_TK"])
    # Without their places the parts would repeat the first one's noise.
    ids = torch.cat([part.aux["ids_TK"] for part in apart])
    logits = torch.cat([part.logits_TE for part in apart])
    assert not (torch.equal(ids, whole.aux["ids_TK"]) and torch.allclose(logits, whole.logits_TE))


def test_micro_batches_of_a_step_do_not_share_their_noise():
    router = {"name": "linear", "gate_noise": 1.0}
    moe = MoE(MoEConfig(model_dim=7, hidden_dim=4, num_experts=6, router=router))
    x = torch.randn(1, 4, 7).expand(2, 4, 7)
    one, two = (
        moe(x[i : i + 1], context=RoutingContext(step=0, samples=(i, i + 1)), return_info=True)[1].routing
        for i in range(2)
    )
    assert (one.logits_TE != two.logits_TE).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (20_000,)])
def test_native_noise_has_the_same_bits(shape, monkeypatch):
    key = torch.tensor(-123456789012345)
    counter = torch.randint(-(2**62), 2**62, shape, generator=torch.Generator().manual_seed(0))
    for counters in (counter, counter.T if counter.dim() == 2 else counter):
        got = noise.uniform(key, counters)
        with monkeypatch.context() as patch:
            patch.setattr(noise, "hashed_uniform", lambda *_: None)
            want = noise.uniform(key, counters)
        assert torch.equal(got, want)
        assert got.shape == counters.shape
