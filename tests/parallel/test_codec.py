"""What comes back is within the stated error, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from flexpert.parallel.codec import BF16, CODECS, FP8, NONE

SHORT = [torch.float32, torch.bfloat16, torch.float16]


def there_and_back(codec, rows):
    wire = codec.encode(rows)
    assert len(wire) == len(rows)
    return codec.decode(wire, rows.dtype, rows.shape[1])


def wide_rows(dtype, seed=0):
    """Rows of very different sizes, elements of a row too, as far as the dtype goes."""
    generator = torch.Generator().manual_seed(seed)
    span = 4 if dtype == torch.float16 else 30
    exponent = torch.rand(300, 1, generator=generator) * 2 * span - span
    spread = torch.rand(300, 40, generator=generator) * -14
    return (torch.randn(300, 40, generator=generator) * 2 ** (exponent + spread)).to(dtype)


def test_names():
    assert {name: codec.name for name, codec in CODECS.items()} == {
        "none": "none",
        "bf16": "bf16",
        "fp8": "fp8",
    }


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_doubles_and_integers_are_unchanged(codec, dtype):
    rows = (torch.randn(5, 3, dtype=torch.float64) * 9).to(dtype)
    assert codec.encode(rows) is rows
    assert there_and_back(codec, rows) is rows


@pytest.mark.parametrize("dtype", SHORT)
def test_none_is_the_identity(dtype):
    rows = torch.randn(5, 3).to(dtype)
    assert NONE.encode(rows) is rows
    assert there_and_back(NONE, rows) is rows


def test_bf16_halves_fp32_within_its_rounding():
    rows = wide_rows(torch.float32)
    wire = BF16.encode(rows)
    assert wire.dtype == torch.bfloat16
    got = there_and_back(BF16, rows)
    assert got.dtype == torch.float32
    error = (got.double() - rows.double()).abs()
    assert (error <= 2**-8 * rows.double().abs()).all()
    assert error.max() > 0
    special = torch.tensor([[math.inf, -math.inf, 0.0, 3.4e38]])
    assert there_and_back(BF16, special).tolist() == [[math.inf, -math.inf, 0.0, math.inf]]


@pytest.mark.parametrize("dtype", SHORT[1:])
def test_bf16_leaves_halves_alone(dtype):
    rows = torch.randn(5, 3).to(dtype)
    assert BF16.encode(rows) is rows


@pytest.mark.parametrize("dtype", SHORT)
def test_fp8_is_a_byte_each_and_a_scale_within_its_error(dtype):
    rows = wide_rows(dtype)
    wire = FP8.encode(rows)
    assert wire.dtype == torch.uint8
    assert wire.shape == (300, 44)
    got = there_and_back(FP8, rows)
    assert got.dtype == dtype
    x, largest = rows.double(), rows.double().abs().amax(1, keepdim=True)
    bound = 2**-4 * x.abs() + 2**-10 * largest / 448
    result_rounding = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    bound = bound + result_rounding * x.abs() + (2**-25 if dtype == torch.float16 else 0)
    error = (got.double() - x).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert (error > bound / 2).any(), "the bound is far from sharp"
    # The largest of each row is a number of the format, so only its scale is rounded.
    at_largest = x.abs() == largest
    assert (error[at_largest] <= (2**-22 + result_rounding) * x.abs()[at_largest]).all()


def test_fp8_keeps_rows_of_zeros_and_the_least_numbers():
    rows = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [1e-40, -1e-40], [2e-38, 1e-38]])
    got = there_and_back(FP8, rows)
    assert got[0].tolist() == [0, 0]
    least_scale = torch.finfo(torch.float32).tiny
    assert ((got - rows).abs() <= 2**-4 * rows.abs() + 2**-10 * least_scale).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", SHORT)
def test_what_is_not_finite_stays_in_its_row(bad, dtype):
    rows = torch.randn(4, 6).to(dtype)
    spoiled = rows.clone()
    spoiled[2, 3] = bad
    for codec in CODECS.values():
        want, got = there_and_back(codec, rows), there_and_back(codec, spoiled)
        assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])
        assert not got[2, 3].isfinite()
        if codec is FP8:
            assert got[2].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_empty_rows(codec, shape):
    rows = torch.zeros(shape)
    assert torch.equal(there_and_back(codec, rows), rows)


def test_strided_rows():
    rows = torch.randn(6, 5).T
    for codec in CODECS.values():
        assert torch.equal(there_and_back(codec, rows), there_and_back(codec, rows.contiguous()))


def test_every_number_of_the_format_arrives_as_it_is():
    """Rows whose scale is 1: all 254 finite numbers, both zeros among them, exactly."""
    codes = torch.arange(256).to(torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    rows = torch.stack([numbers, torch.full_like(numbers, 448.0)], 1)
    assert len(rows) == 254
    assert torch.equal(there_and_back(FP8, rows), rows)
