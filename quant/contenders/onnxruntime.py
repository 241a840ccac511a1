"""ONNX Runtime's MatMulNBits: accuracy level 4 rounds activations to int8, 0 keeps float32.

Every copy of the weight is a session. All share one pool of threads: with a pool each, the threads
of the sessions before would still spin and take the cores from the one that is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quant.grid import QuantizedTensor

MODES = ("accuracy_level_0", "accuracy_level_4")


def build(
    mode: str, qt: QuantizedTensor, copies: int
) -> tuple[list[Callable[[Tensor], object]], int]:
    import onnxruntime

    _share_threads(torch.get_num_threads())
    model = _model(qt, int(mode[-1]))
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(copies)
    ]
    size = qt.codes.numel() // 2 + qt.grid.scales.numel() * 4
    return [partial(_run, s) for s in sessions], size


@cache
def _share_threads(threads: int) -> None:
    """Once a process, before its first session: later calls would be refused."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _run(session: Any, x: Tensor) -> object:
    return session.run(None, {"x": x.numpy()})


def _model(qt: QuantizedTensor, accuracy_level: int) -> bytes:
    """One MatMulNBits node with the tensor's codes and scales (zero 8)."""
    from onnx import TensorProto, helper, numpy_helper

    n, k = qt.codes.shape
    groups = qt.grid.scales.shape[1]
    codes = qt.codes.view(n, groups, -1, 2)
    packed = (codes[..., 0] | codes[..., 1] << 4).numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=k // groups,
        accuracy_level=accuracy_level,
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])
    scales = numpy_helper.from_array(qt.grid.scales.numpy().reshape(-1), "scales")
    weights = [numpy_helper.from_array(packed, "codes"), scales]
    graph = helper.make_graph([node], "matmul", [x], [y], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model.SerializeToString()
