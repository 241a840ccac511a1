"""The compiled kernels: one C library, loaded with ctypes, sharing torch's threads.

`LLAMA_GPTQ_ISA` forces an instruction set (scalar, avx2, avxvnni, avx512, neon); the best one that
the processor has is taken otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

PRECISIONS = ("exact", "high", "fast")  # `enum precision` of kern.h
TILE = 16  # outputs, of kern.h
_INTERFACE = 2  # KERN_INTERFACE of kern.h


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None with one warning where it was not built, or from other sources.

    Raises:
        ValueError: LLAMA_GPTQ_ISA names an instruction set that cannot run here.
    """
    names = ("libkern.so", "libkern.dylib", "libkern.dll")
    # An editable install has the sources in one folder of the package, the library in another.
    found = [file for folder in __path__ for name in names if (file := Path(folder, name)).exists()]
    kern = ctypes.CDLL(str(found[0])) if found else None
    if kern is None or not hasattr(kern, "kern_interface") or kern.kern_interface() != _INTERFACE:
        warnings.warn(
            f"the native kernels are {'built from other sources' if kern else 'not built'}, so "
            "4-bit models run slowly; install a C compiler and run: pip install "
            "--force-reinstall --no-deps -e .",
            stacklevel=2,
        )
        return None
    kern.kern_available.restype = ctypes.c_char_p
    kern.kern_selected.restype = ctypes.c_char_p
    kern.kern_select.argtypes = [ctypes.c_char_p]
    kern.kern_use_pool.argtypes = [ctypes.c_void_p, ctypes.c_int]
    kern.kern_round_block.argtypes = [ctypes.c_void_p]
    kern.kern_fit_scales.argtypes = [ctypes.c_void_p]
    kern.kern_multiply.argtypes = [ctypes.c_void_p]
    kern.kern_use_pool(torch_pool(), torch.get_num_threads())
    forced = os.environ.get("LLAMA_GPTQ_ISA")
    if forced and kern.kern_select(forced.encode()):
        names = kern.kern_available().decode()
        raise ValueError(f"LLAMA_GPTQ_ISA={forced}: not available here; there are {names}")
    return kern


def torch_pool() -> int | None:
    """The address of torch's `torch_parallel_for`; None in a torch that has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).is_file():
            pool = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return ctypes.cast(pool, ctypes.c_void_p).value if pool else None
    return None
