"""pytest tests/test_kernels.py: backends against float64, the CPU kernel against exact integers."""

from __future__ import annotations

from collections.abc import Iterator

import integer_model
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ISAS, KERN, built, make, rows, shuffled, worst_error
from torch import Tensor

from quant.grid import Grid, QuantizedTensor
from quant.kernels import BACKENDS, PRECISIONS, cpu


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor in turn."""
    assert KERN is not None
    assert KERN.kern_select(request.param.encode()) == 0
    assert KERN.kern_selected().decode() == request.param
    yield request.param
    KERN.kern_select(None)


def agrees_with_the_model(qt: QuantizedTensor, x: Tensor) -> None:
    for precision in ("high", "fast"):
        effective = "high" if qt.bits == 8 else precision
        y = cpu.matmul(x, cpu.pack(qt), precision)
        expected = integer_model.matmul(x.numpy(), qt, effective)
        np.testing.assert_array_equal(y.numpy(), expected, f"{precision} {tuple(qt.codes.shape)}")


@built
@pytest.mark.parametrize("one_zero", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256, -1])
def test_integer_precisions_are_exact_integers(
    isa: str, width: int, bits: int, one_zero: bool
) -> None:
    agrees_with_the_model(make(40, 768, width, bits, one_zero), rows(5, 768))


@built
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("width", [32, 96, 128, 256, -1])
def test_many_rows_are_exact_integers(isa: str, width: int, bits: int) -> None:
    """So many that codes are unpacked for all of them, in panels that groups may straddle."""
    agrees_with_the_model(make(40, 2304, width, bits), rows(77, 2304))


@built
@pytest.mark.parametrize("k", [1, 3, 17, 31, 172])
@pytest.mark.parametrize("n", [1, 3, 17, 31, 172])
def test_odd_sizes(isa: str, n: int, k: int) -> None:
    for m in (1, 2, 3, 7, 8, 9, 15, 17, 31, 70):
        qt, x = make(n, k), rows(m, k)
        agrees_with_the_model(qt, x)
        assert worst_error(cpu.matmul(x, cpu.pack(qt), "exact"), x, qt) < 1e-6


@built
def test_columns_of_any_group(isa: str) -> None:
    for m in (1, 20, 70):
        qt, x = shuffled(make(33, 300), 5), rows(m, 300)
        agrees_with_the_model(qt, x)
        assert worst_error(cpu.matmul(x, cpu.pack(qt), "exact"), x, qt) < 1e-6


@built
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 128, 256, -1])
@pytest.mark.parametrize("m", [1, 4, 8, 9, 70])
def test_exact_against_float64(isa: str, m: int, width: int, bits: int) -> None:
    qt, x = make(48, 1024, width, bits), rows(m, 1024)
    assert worst_error(cpu.matmul(x, cpu.pack(qt), "exact"), x, qt) < 1e-6


@built
@pytest.mark.parametrize("one_zero", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_zero_above_every_code(isa: str, bits: int, one_zero: bool) -> None:
    """Files of GPTQ's version 1 can hold it: they store the zero less one."""
    qt, x = make(33, 256, 64, bits, one_zero), rows(3, 256)
    zeros = torch.full_like(qt.grid.zeros, 2**bits)
    zeros[3:5] = 2**bits if one_zero else 0
    qt = QuantizedTensor(qt.codes, Grid(qt.grid.scales, zeros, bits))
    agrees_with_the_model(qt, x)
    for m in (1, 3):
        assert worst_error(cpu.matmul(x[:m], cpu.pack(qt), "exact"), x[:m], qt) < 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20) | st.integers(65, 80),
    n=st.integers(1, 70),
    groups=st.integers(1, 4),
    width=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([2, 3, 4, 8]),
    one_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
@built
def test_random_shapes(
    m: int, n: int, groups: int, width: int, bits: int, one_zero: bool, seed: int
) -> None:
    qt, x = make(n, groups * width, width, bits, one_zero, seed), rows(m, groups * width, seed)
    agrees_with_the_model(qt, x)
    assert worst_error(cpu.matmul(x, cpu.pack(qt), "exact"), x, qt) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_backend(name: str, precision: str, dtype: torch.dtype) -> None:
    backend = BACKENDS[name]
    if not backend.is_available(torch.device("cpu")):
        pytest.skip(f"{name} is not available here")
    steps = {"exact": torch.inf, "high": 32767, "fast": 127}[precision]
    for qt in (make(48, 256, 64), make(48, 256, -1, 8), shuffled(make(48, 256), 3)):
        x = (rows(6, 256) / 30).to(dtype).view(2, 3, 256)
        y = backend.matmul(x, backend.pack(qt), precision)
        assert y.dtype == dtype and y.shape == (2, 3, 48)
        weight = qt.dequantize(torch.float64)
        error = (y.double() - x.double() @ weight.T).abs()
        largest = x.double().abs().amax(-1, keepdim=True)
        rounded = largest / steps / 2 * weight.abs().sum(-1)
        summed = x.double().abs() @ weight.abs().T * (1e-6 + torch.finfo(dtype).eps)
        if name == "reference":  # adds up in the dtype of x
            summed *= 16
        assert (error <= rounded + summed).all()


@built
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_are_those_of_float32_rounded(
    isa: str, dtype: torch.dtype, precision: str
) -> None:
    """Bit by bit, with subnormals, sums beyond float16, infinities, and NaN."""
    for qt in (make(40, 128, 32), shuffled(make(40, 128), 3)):
        for m in (1, 7, 70):
            x = (rows(m, 128) * torch.logspace(-8, 3, m)[:, None]).to(dtype)
            x[-1, 5] = torch.nan
            packed = cpu.pack(qt)
            y, same = cpu.matmul(x, packed, precision), cpu.matmul(x.float(), packed, precision)
            assert torch.equal(y[:-1], same[:-1].to(dtype)) and y[-1].isnan().all()


@built
def test_16_bit_floats_of_every_value() -> None:
    """A code of 1 and a zero of 0: every float16 and bfloat16 comes out as it went in."""
    codes, scales = torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1)
    packed = cpu.pack(QuantizedTensor(codes, Grid(scales, torch.zeros_like(codes), 4)))
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)[:, None]
        y = cpu.matmul(x, packed, "exact")
        fits = x.float().abs() < 2.0**100
        assert torch.equal(y[fits], x[fits]) and y[x.isnan()].isnan().all()


@built
@pytest.mark.parametrize("precision", PRECISIONS)
def test_strides_and_empty_inputs(precision: str) -> None:
    packed = cpu.pack(make(40, 96, 32))
    x = rows(6, 96)
    expected = cpu.matmul(x, packed, precision)
    unaligned = torch.empty(6 * 97 + 1)[1:].view(6, 97)[:, :96].copy_(x)
    for same in (x.T.contiguous().T, unaligned, x.view(6, 96, 1).expand(6, 96, 2)[..., 0]):
        assert torch.equal(cpu.matmul(same, packed, precision), expected)
    assert cpu.matmul(x[:0], packed, precision).shape == (0, 40)
    assert torch.equal(
        cpu.matmul(x[2], packed, precision)[None], cpu.matmul(x[2:3], packed, precision)
    )
    if precision != "exact":  # whose order of summation depends on the number of rows
        assert torch.equal(cpu.matmul(x[::2], packed, precision), expected[::2])


@built
def test_the_largest_sums(isa: str) -> None:
    """Codes of 15 and 255, activations of one magnitude, a group of 28672: no sum overflows."""
    for bits in (4, 8):
        codes = torch.full((16, 28672), 2**bits - 1, dtype=torch.uint8)
        for zero in (1, 2**bits - 1):
            zeros = torch.full((16, 1), zero, dtype=torch.uint8)
            qt = QuantizedTensor(codes, Grid(torch.ones(16, 1), zeros, bits))
            for x in (torch.ones(1, 28672), -torch.ones(65, 28672)):
                agrees_with_the_model(qt, x)


@built
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spreads_to_its_row_alone(isa: str, precision: str, bad: float) -> None:
    qt = make(40, 128, 32)
    for m in (5, 20, 70):
        x = rows(m, 128)
        clean = cpu.matmul(x, cpu.pack(qt), precision)
        x[3, 70] = bad
        y = cpu.matmul(x, cpu.pack(qt), precision)
        assert not y[3].isfinite().any()
        others = torch.arange(m) != 3
        assert torch.equal(y[others], clean[others])


@built
def test_tiny_activations(isa: str) -> None:
    """Exact keeps denormals, to one unit of the smallest for each product and for the sum."""
    qt = make(16, 64)
    weight = qt.dequantize(torch.float64)
    for size in (1e-30, 1e-37, 1e-42, 0.0):
        for m in (2, 20):
            x = rows(m, 64) * size
            agrees_with_the_model(qt, x)
            error = (cpu.matmul(x, cpu.pack(qt), "exact").double() - x.double() @ weight.T).abs()
            rounded = 1e-6 * x.double().abs() @ weight.abs().T
            assert (error <= rounded + 2.0**-149 * (1 + weight.abs().sum(1))).all(), (size, m)


@built
def test_each_instruction_set_has_its_own_arithmetic() -> None:
    """In exact with one row each adds in another order, so none stands in for another."""
    assert KERN is not None
    packed, x = cpu.pack(make(48, 1024, 128)), rows(1, 1024)
    results = {}
    for name in ISAS:
        KERN.kern_select(name.encode())
        results[name] = cpu.matmul(x, packed, "exact")
    KERN.kern_select(None)
    for i, name in enumerate(ISAS):
        for other in ISAS[:i]:
            assert not torch.equal(results[name], results[other]), (name, other)
