"""Which runtimes load a checkpoint, by the rules of their own loaders (runtime_rules.py).

Every answer names what decides: a setting of the config, or a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quant import runtime_rules
from quant.config import QuantConfig
from quant.runtime_rules import Facts, Rule


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime loads the folder, and the rule with the tensor or setting that decides;
    `loads` is None where the rules are not known.
    """

    runtime: str
    loads: bool | None
    why: str


def verdicts(facts: Facts) -> list[Verdict]:
    """One verdict for each of RUNTIMES."""
    return [verdict(runtime, facts) for runtime in RUNTIMES]


def verdict(runtime: str, facts: Facts) -> Verdict:
    """The first rule that a runtime finds broken, or what it needs.

    Raises:
        ValueError: no such runtime.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} is unknown; there are {', '.join(RUNTIMES)}")
    rules, needs = RUNTIMES[runtime]
    if facts.method == "gguf":
        return Verdict(runtime, *_GGUF_FILES[runtime])
    if facts.method in _OTHER_FILES and runtime != "llama.cpp":
        return Verdict(
            runtime, False, "reads Hugging Face folders; python cli.py convert makes one"
        )
    if facts.method == "awq" and runtime != "llama.cpp":
        return Verdict(runtime, None, "AWQ folders: its rules are not known here")
    broken = next((why for is_broken, why in rules(facts) if is_broken), "")
    fine = "a plain Llama folder" if facts.method == "float" else "all rules hold"
    return Verdict(runtime, not broken, broken or needs.get(facts.method, fine))


def check_target(runtime: str, config: QuantConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse, before any work, a grid that the runtime would not load.

    Args:
        runtime: one of RUNTIMES.
        config: the grid to make; symmetric ones become GPTQ version 1, others version 2.
        shapes: (out, in) of the linears of a layer.

    Raises:
        ValueError: the runtime is unknown, or would not load the result.
    """
    method = "gptq" if config.symmetric else "gptq_v2"
    facts = Facts(method, config, shapes, quantized_head=config.has_head)
    found = verdict(runtime, facts)
    if not found.loads:
        raise ValueError(f"--target {runtime} will not load the result: {found.why}")


_OTHER_FILES = ("meta", "llama2c")
_SAFETENSORS = "reads folders of .safetensors; this is a GGUF file (export --to float16 makes one)"
_GGUF_FILES = {  # by the loaders' own sources, all of them for single files
    "transformers": (True, "with gguf_file=NAME, gguf and accelerate installed; it dequantizes"),
    "vllm": (True, "on a GPU, since 0.24 with vllm-gguf-plugin installed"),
    "sglang": (True, "on a GPU of NVIDIA or Moore Threads, or an Ascend NPU"),
    "exllamav2": (False, _SAFETENSORS),
    "gptqmodel": (False, _SAFETENSORS),
    "llama.cpp": (True, "its own format"),
}
_GPTQ_PACKAGES = "with optimum >= 1.24 and gptqmodel >= 1.4.3 installed"
RUNTIMES: dict[str, tuple[Callable[[Facts], Iterator[Rule]], dict[str, str]]] = {
    "transformers": (
        runtime_rules.transformers,
        {
            "gptq": _GPTQ_PACKAGES,
            "gptq_v2": _GPTQ_PACKAGES,
            "compressed-tensors": "with compressed-tensors >= 0.15 installed",
        },
    ),
    "vllm": (runtime_rules.vllm, {}),
    "sglang": (runtime_rules.sglang, {}),
    "exllamav2": (runtime_rules.exllamav2, {}),
    "gptqmodel": (runtime_rules.gptqmodel, {}),
    "llama.cpp": (
        runtime_rules.llama_cpp,
        dict.fromkeys(
            ("gptq", "gptq_v2", "compressed-tensors", "awq", "float", *_OTHER_FILES),
            "through export --to gguf",
        ),
    ),
}
