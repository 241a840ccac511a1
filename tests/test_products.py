"""pytest tests/test_products.py: large float32 products against float64, for every stride."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ISAS, KERN, built

from quant.native import products

# (m, k, n): within a block, across the borders of blocks, panels and depths, and far from square.
SHAPES = [(1, 1, 1), (13, 300, 40), (70, 385, 97), (300, 800, 130), (16, 2000, 600)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ISAS)
def any_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """One instruction set, and no product too small for it."""
    assert KERN is not None
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    KERN.kern_select(request.param.encode())
    yield
    KERN.kern_select(None)


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@built
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64(any_work: None, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for a in (random(m, k), random(k, m).T, random(m, k + 9)[:, 5:-4]):
        for b in (random(k, n, seed=1), random(n, k, seed=1).T, random(k, n + 9, seed=1)[:, 5:-4]):
            assert_close(products.product(a, b), a.double() @ b.double())
    out, a, b = random(m, n + 3, seed=2)[:, 1:-2], random(k, m).T, random(k, n, seed=1)
    expected = out.double() - 2 * (a.double() @ b.double())
    products.add_product_(out, a, b, -2)
    assert_close(out, expected)


@built
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 31), (400, 290), (900, 70)])
def test_the_upper_triangle_of_a_gram_matrix(any_work: None, tokens: int, width: int) -> None:
    rows, out = random(tokens, width), random(width, width, seed=1)
    expected = out.double() + rows.double().T @ rows.double()
    products.add_gram_(out, rows)
    assert_close(out.triu(), expected.triu())


@built
@pytest.mark.parametrize("width", [1, 31, 385, 1100])
def test_twice_the_half_of_a_form_is_the_form(any_work: None, width: int) -> None:
    a, square = random(40, width + 2)[:, 1:-1], random(width, width, seed=1)
    symmetric = square + square.T
    exact = (a.double() @ symmetric.double() * a).sum(1)
    got = 2 * (products.half_product(a, symmetric) * a).double().sum(1)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=2e-2)
    by_torch = 2 * (products.half_product(a.double(), symmetric.double()) * a).sum(1)
    torch.testing.assert_close(by_torch, exact)


@built
@pytest.mark.parametrize(
    ("m", "k", "group", "n"), [(1, 1, 1, 1), (640, 64, 128, 97), (900, 400, 300, 600)]
)
def test_sums_of_products_over_rows(any_work: None, m: int, k: int, group: int, n: int) -> None:
    a, b, c = random(m, k + 3)[:, :-3], random(k, n, seed=1), random(m, n, seed=2)
    exact = (a.double() @ b.double() * c).view(-1, group, n).sum(1)
    torch.testing.assert_close(
        products.product_sums(a, b, c, group).double(), exact, rtol=1e-4, atol=2e-3
    )
    assert torch.equal(products.product_sums(a.double(), b.double(), c.double(), group), exact)


@built
def test_linear_has_the_bias_and_the_shape_of_torch(any_work: None) -> None:
    x, weight, bias = random(3, 50, 70), random(50, 70, seed=1), random(50, seed=2)
    got = products.linear(x, weight, bias)
    assert got.shape == (3, 50, 50)
    assert_close(got, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))


@built
def test_results_do_not_depend_on_threads_or_other_rows(any_work: None) -> None:
    a, b = random(600, 500), random(500, 400, seed=1)
    whole, threads = products.product(a, b), torch.get_num_threads()
    torch.set_num_threads(1)
    part = products.product(a[123:456], b)
    torch.set_num_threads(threads)
    assert torch.equal(part, whole[123:456])


def test_what_the_library_cannot_take_goes_to_torch() -> None:
    double = torch.ones(200, 300, dtype=torch.float64)
    assert products.product(double, double.T).dtype is torch.float64
    weight = torch.ones(300, 300, requires_grad=True)
    products.linear(torch.ones(200, 300), weight).sum().backward()
    assert weight.grad is not None
    assert products.product(torch.ones(200, 600)[:, ::2], torch.ones(300, 300))[0, 0] == 300


@built
def test_gradients_of_a_linear(any_work: None) -> None:
    x, weight = random(3, 40, 70).requires_grad_(), random(50, 70, seed=1).requires_grad_()
    slope = random(3, 40, 50, seed=2)
    (products.linear(x, weight) * slope).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert_close(x.grad, slope.double() @ weight.double())
    assert_close(weight.grad, slope.flatten(0, 1).double().T @ x.flatten(0, 1).double())
