"""The native CPU backend: codes stay packed in memory and are unpacked in registers.

    y[m, n] = sum over groups g of
              scale[n, g] * sum over k in g of (code[n, k] - zero[n, g]) * x[m, k]

Three precisions share one packed layout; they differ in what becomes of x:

    exact   float32 throughout
    high    int16, one scale per row and block of up to 256 inputs; integer sums are exact
    fast    int8, one scale per row and block of 32 inputs; integer sums are exact

8-bit codes compute `fast` as `high`. Codes of 2 and 3 bits are stored in 4. The layout is
described in native/kern.h. Results do not depend on the number of threads; those of integers are
the same on every processor, and do not depend on the other rows.

Letters: M rows of x, K in_features, N out_features, G groups, T tiles of 16 outputs.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, empty, float32
from torch.compiler import is_compiling

from quant.grid import QuantizedTensor
from quant.native import PRECISIONS, TILE, library
from quant.native.weight import DTYPES, pack_call, view

_LARGE_PAGE = 2 << 20
_NUMBER = {name: number for number, name in enumerate(PRECISIONS)}


def is_available(device: torch.device) -> bool:
    """Whether the device is the CPU and the library was built."""
    return device.type == "cpu" and library() is not None


def pack(qt: QuantizedTensor) -> dict[str, Tensor]:
    """Packed tensors of one matrix; sizes are read off their shapes.

    Returns:
        codes: uint8 (T, lines, 64), two codes a byte up to 4 bits, else one.
        scales: float16 (T, G, 16).
        zeros: uint8 (T, G, 16), or (1,) where all are the same.
        extent: empty (N, K, 0).
        gather: int32 (padded K,), the input of each packed column or -1; absent where it would
            be 0..K-1.

    Raises:
        ValueError: bits other than 2, 3, 4 and 8, or parts that do not fit each other.
    """
    _check(qt)
    out_features, in_features = qt.codes.shape
    groups = qt.grid.scales.shape[1]
    gather = _columns(qt, groups)
    codes = torch.nn.functional.pad(qt.codes, (0, 1))[:, gather]  # column -1 holds zeros
    packed = {
        "codes": in_large_pages(_pack_codes(_pad_rows(codes), 8 if qt.bits == 8 else 4)),
        "scales": _tiles(_pad_rows(qt.grid.scales).to(torch.float16)),
        "zeros": _tiles(_pad_rows(qt.grid.zeros)),
        "extent": torch.empty(out_features, in_features, 0),
    }
    if (qt.grid.zeros == qt.grid.zeros[0, 0]).all():
        packed["zeros"] = qt.grid.zeros[0, :1].clone()
    if not torch.equal(gather, torch.arange(in_features)):
        packed["gather"] = gather.to(torch.int32)
    return packed


def _check(qt: QuantizedTensor) -> None:
    """Refuse what would be packed wrong. GPTQ's version 1 can hold zeros of max_code + 1."""
    (out_features, in_features), scales, zeros = qt.codes.shape, qt.grid.scales, qt.grid.zeros
    groups, index, most_code = scales.shape[1], qt.group_index, qt.grid.max_code
    if qt.bits not in (2, 3, 4, 8):
        raise ValueError(f"bits {qt.bits}: the kernel has 2, 3, 4 and 8")
    if scales.shape != zeros.shape or len(scales) != out_features:
        grid = f"scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)}"
        raise ValueError(f"{grid} for {out_features} outputs")
    if index is None and in_features % groups:
        raise ValueError(f"{in_features} inputs do not divide into {groups} groups")
    if index is not None and (len(index) != in_features or int(index.max()) >= groups):
        read = f"group_index of {len(index)} up to {index.max()}"
        raise ValueError(f"{read}: {in_features} inputs, {groups} groups")
    largest = ("code", qt.codes.max(), most_code), ("zero", zeros.max(), most_code + 1)
    for name, found, most in largest:
        if int(found) > most:
            raise ValueError(f"a {name} is {found}; with {qt.bits} bits the most is {most}")


def _columns(qt: QuantizedTensor, groups: int) -> Tensor:
    """The input of each packed column: sorted by group, groups padded with -1 to one length."""
    index = qt.group_index
    if index is None:
        index = torch.arange(qt.in_features) // (qt.in_features // groups)
    order = index.long().argsort(stable=True)
    counts = torch.bincount(index.long(), minlength=groups)
    width = -(-int(counts.max()) // 32) * 32
    gather = torch.full((groups, width), -1)
    gather[torch.arange(width) < counts[:, None]] = order
    return gather.flatten()


def _pad_rows(tensor: Tensor) -> Tensor:
    """(N, ...) -> (N rounded up to whole tiles, ...), with zeros."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % TILE))


def _tiles(tensor: Tensor) -> Tensor:
    """(N, G) -> (T, G, 16)."""
    return tensor.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 -> (T, lines, 64): 4 inputs of each of 16 outputs, with 4 bits 8 inputs."""
    if bits == 8:
        lines = codes.view(len(codes) // TILE, TILE, -1, 4)
    else:
        halves = codes.view(len(codes) // TILE, TILE, -1, 2, 4)
        lines = halves[..., 0, :] | halves[..., 1, :] << 4
    return lines.transpose(1, 2).flatten(2).contiguous()


def in_large_pages(codes: Tensor) -> Tensor:
    """A copy in fresh memory with large pages, which is read faster than small ones; the tensor
    itself where it is small or the system has none.
    """
    size = codes.numel()
    if size < 2 * _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return codes
    memory = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # type: ignore[attr-defined]
    memory.madvise(mmap.MADV_HUGEPAGE)  # type: ignore[attr-defined]
    room = torch.frombuffer(memory, dtype=torch.uint8)
    start = -room.data_ptr() % _LARGE_PAGE
    return room[start : start + size].view(codes.shape).copy_(codes)


def matmul(x: Tensor, packed: dict[str, Tensor], precision: str = "exact") -> Tensor:
    """x (..., K) in float32, float16 or bfloat16 -> (..., N) in the same dtype; sums in float32.

    Raises:
        ValueError: x does not fit the packed matrix, or the precision is unknown.
    """
    if precision not in _NUMBER:
        raise ValueError(f"precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}")
    call = _operator if is_compiling() else _matmul
    return call(
        x,
        packed["codes"],
        packed["scales"],
        packed["zeros"],
        packed["extent"],
        packed.get("gather"),
        _NUMBER[precision],
    )


class _Plan:
    """The arguments of one packed matrix, checked once; valid while its tensors are the same."""

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor, extent: Tensor, gather: Tensor | None
    ) -> None:
        weight = view(codes, scales, zeros, extent, gather)
        self.codes = weakref.ref(codes, _forget(id(codes)))
        self.scales, self.zeros, self.extent, self.gather = scales, zeros, extent, gather
        self.pointers = codes.data_ptr(), scales.data_ptr(), zeros.data_ptr()
        self.n, self.k = extent.shape[0], extent.shape[1]
        self.weight, self.address = weight, ctypes.addressof(weight)
        self.multiply = library().kern_matmul  # type: ignore[union-attr]


_PLANS: dict[int, _Plan] = {}  # by id of the codes


def _forget(key: int) -> Callable[[object], object]:
    forget = _PLANS.pop  # which is there to the end, when modules are emptied
    return lambda _: forget(key, None)


def _matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    extent: Tensor,
    gather: Tensor | None,
    precision: int,
) -> Tensor:
    """Check every size, then call the library. Small products take as long as what is done here, so
    that little is called.
    """
    plan = _PLANS.get(id(codes))
    if (
        plan is None
        or plan.codes() is not codes
        or plan.scales is not scales
        or plan.zeros is not zeros
        or plan.extent is not extent
        or plan.gather is not gather
        or plan.pointers != (codes.data_ptr(), scales.data_ptr(), zeros.data_ptr())
    ):
        plan = _PLANS[id(codes)] = _Plan(codes, scales, zeros, extent, gather)
    *outer, k = x.shape
    dtype = x.dtype
    if k != plan.k or dtype not in DTYPES or not x.is_cpu:
        raise ValueError(
            f"x of shape {tuple(x.shape)}, {dtype}, on {x.device}: expected (..., {plan.k}) "
            "floats on the CPU"
        )
    rows, stride = x, k
    if not x.is_contiguous():
        rows = x.reshape(-1, k)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        stride = rows.stride(0)
    m = x.numel() // k
    y = empty(*outer, plan.n) if dtype is float32 else empty(*outer, plan.n, dtype=dtype)
    columns = 0 if gather is None else gather.data_ptr()
    source = rows.data_ptr(), columns, stride, DTYPES[dtype]
    if plan.multiply(pack_call(plan.address, *source, y.data_ptr(), m, precision)):
        raise MemoryError(f"no memory for the activations of {m} rows")
    return y


_LIBRARY = torch.library.Library("llama_gptq", "DEF")
_LIBRARY.define(
    "matmul(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor extent, Tensor? gather, "
    "int precision) -> Tensor"
)
_LIBRARY.impl("matmul", _matmul, "CPU")
_operator = torch.ops.llama_gptq.matmul


@torch.library.register_fake("llama_gptq::matmul", lib=_LIBRARY)
def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    extent: Tensor,
    gather: Tensor | None,
    precision: int,
) -> Tensor:
    """The shape of the result, for torch.compile."""
    return x.new_empty(*x.shape[:-1], extent.shape[0])
