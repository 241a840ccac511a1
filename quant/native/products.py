"""Large float32 products on the CPU by the compiled library, where it runs; else by torch.

torch's own products reach about half of what a processor with 512-bit vectors can do where its BLAS
does not use them. Each function here is one line of torch and says which.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.native import library

_LEAST_WORK = 1 << 22  # multiplications below which the copies cost more than they gain
_FEWEST_ROWS = 128  # of x, below which to copy a weight costs more than it gains
_BLOCK = 512  # on the diagonal of a triangle: products of all of it are made


class _Product(ctypes.Structure):
    """`kern_product` of kern.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int64) for name in ("a_row", "a_column", "b_row", "b_column", "out_row")),
        ("alpha", ctypes.c_float),
        ("add", ctypes.c_int32),
        ("upper", ctypes.c_int32),
        ("half", ctypes.c_int32),
        ("with_", ctypes.c_void_p),
        ("group", ctypes.c_int64),
    ]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias): x (..., in), weight (out, in)."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and bias is None and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Linear.apply(rows, weight)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], len(weight))
    if len(rows) < _FEWEST_ROWS or not _can(rows, weight):
        return F.linear(x, weight, bias)
    out = torch.empty(len(rows), len(weight))
    _multiply(out, rows.T, weight.T)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """x @ weight.T, its gradients by the same products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return product(slope, weight), product(slope.T, x) if ctx.needs_input_grad[1] else None


def add_product_(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, for matrices of any strides; the rows of out must be contiguous."""
    if _can(a, b):
        _multiply(out, a.T, b, alpha=alpha, add=True)
    elif a.shape[1]:
        out.addmm_(a, b, alpha=alpha)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, for matrices of any strides."""
    if not _can(a, b):
        return a @ b
    out = torch.empty(len(a), b.shape[1])
    _multiply(out, a.T, b)
    return out


def add_gram_(out: Tensor, rows: Tensor) -> None:
    """Add rows.T @ rows to out, of which only the upper triangle is right afterwards."""
    if _can(rows, rows):
        _multiply(out, rows, rows, add=True, upper=True)
        return
    step = max(128, -(-len(out) // 8))  # (8 + 1) / 16 of the products of a full one are made
    for start in range(0, len(out), step):
        end = start + step
        out[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])


def half_product(a: Tensor, symmetric: Tensor) -> Tensor:
    """a @ T, where T + T.T = symmetric and T has zeros below the blocks on its diagonal: half the
    work of a whole product, and all that a quadratic form needs, as a S a^T = 2 a T a^T.
    """
    if _can(a, symmetric):
        out = torch.empty(a.shape)
        _multiply(out, a.T, symmetric, half=True)
        return out
    out = torch.empty_like(a)
    for start in range(0, a.shape[1], _BLOCK):
        here = slice(start, start + _BLOCK)
        out[:, here] = a[:, here] @ symmetric[here, here] / 2
        out[:, here].addmm_(a[:, :start], symmetric[:start, here])
    return out


def product_sums(a: Tensor, b: Tensor, c: Tensor, group: int) -> Tensor:
    """(a @ b * c) summed over every `group` rows, for (m, k), (k, n) and a contiguous (m, n)."""
    if not _can(a, b):
        return (a @ b).mul_(c).view(-1, group, c.shape[1]).sum(1)
    assert c.is_contiguous() and c.dtype is torch.float32
    out = torch.empty(len(a) // group, c.shape[1])
    _multiply(out, a.T, b, with_=c.data_ptr(), group=group)
    return out


def _can(a: Tensor, b: Tensor) -> bool:
    """Whether the library takes these, and the work is worth it."""
    fits = all(t.dtype is torch.float32 and t.is_cpu and 1 in t.stride() for t in (a, b))
    if not fits or a.numel() * max(b.shape) < _LEAST_WORK or torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    kern = library()
    return not grad and kern is not None and kern.kern_selected() != b"scalar"  # BLAS is faster


def _multiply(out: Tensor, a: Tensor, b: Tensor, **others: float) -> None:
    """out (m, n) = a.T @ b for a (k, m), b (k, n), or what the other fields make of it."""
    assert out.stride(1) == 1 and out.shape[1] == b.shape[1]
    pointers = a.data_ptr(), b.data_ptr(), out.data_ptr()
    sizes = a.shape[1], b.shape[1], len(a)
    strides = *a.stride(), *b.stride(), out.stride(0)
    call = _Product(*pointers, *sizes, *strides, **{"alpha": 1.0, **others})
    if library().kern_multiply(ctypes.byref(call)):  # type: ignore[union-attr]
        raise MemoryError(f"a product of {sizes[0]} x {sizes[1]} needs more memory than there is")
