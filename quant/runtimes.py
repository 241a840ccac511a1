"""Which runtimes load a quantized checkpoint, by the rules of their own loaders.

Every rule names what decides: a setting of the config, or a tensor. They were read from the sources
of transformers 5, vLLM and SGLang of mid-2026, GPTQModel of August 2026 and ExLlamaV2 of December
2025; llama.cpp is meant through `export --to gguf`. Other versions may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quant.config import QuantConfig


@dataclass(frozen=True)
class Facts:
    """What the loaders look at.

    Attributes:
        method: "gptq", "gptq_v2", "compressed-tensors", "awq", or "float".
        config: the stored grid; None for float.
        shapes: (out, in) of every kind of linear, by its name in the first layer.
        shuffled: a linear whose groups are not consecutive inputs, or "".
        zero_zero: a linear with a zero of 0 (read for GPTQ version 2 only), or "".
        settings_in_config: config.json itself has the settings.
        quantized_head: lm_head is quantized.
        repeated_head: a tied head is in the file once more.
        gguf_obstacle: why there can be no GGUF file, or "".
    """

    method: str
    config: QuantConfig | None
    shapes: dict[str, tuple[int, int]]
    shuffled: str = ""
    zero_zero: str = ""
    settings_in_config: bool = True
    quantized_head: bool = False
    repeated_head: bool = False
    gguf_obstacle: str = ""

    @property
    def bits(self) -> dict[str, int]:
        """All numbers of bits: of most linears, called "bits", and each other with a linear."""
        others = {own.bits: name for name, own in self.grid.modules}
        return {name: bits for bits, name in {**others, self.grid.bits: "bits"}.items()}

    @property
    def grid(self) -> QuantConfig:
        assert self.config is not None
        return self.config


@dataclass(frozen=True)
class Verdict:
    """Whether a runtime loads the folder, and the rule with the tensor or setting that decides;
    `loads` is None where the rules are not known.
    """

    runtime: str
    loads: bool | None
    why: str


Rule = tuple[bool, str]  # whether the rule is broken, and how


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


def _transformers(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    alone = "reads settings from config.json alone; quantization_config is missing there"
    yield not facts.settings_in_config, alone
    yield facts.quantized_head, "converts linears under model.layers alone; lm_head is quantized"
    others = [name for name, own in facts.grid.modules if own != facts.grid.common]
    yield bool(others), f"reads one grid for all linears; {others[:1]} has another (dynamic)"
    if facts.method == "compressed-tensors":
        yield (
            not facts.grid.symmetric,
            "5.24 with compressed-tensors 0.20 expects unpacked zeros; symmetric is false",
        )
    else:
        yield from _multiples(facts, 32, 32)


def _vllm(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    grid, compressed = facts.grid, facts.method == "compressed-tensors"
    asymmetric = compressed and grid.bits == 4
    for name, bits in facts.bits.items():
        yield bits not in (4, 8), f"takes 4 and 8 bits; {name} is {bits}"
    yield (
        not grid.symmetric and not asymmetric,
        "takes asymmetric grids as compressed-tensors of 4 bits alone; symmetric is false",
    )
    yield from _marlin_groups(facts)
    if facts.shuffled:  # with desc_act tiles are not padded
        yield from _multiples(facts, 64, 128)
    yield from _multiples(facts, 8, 32)


def _sglang(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    yield facts.repeated_head, "fails on a tied head that is stored again; lm_head.weight is there"
    if facts.method == "compressed-tensors":
        yield from _vllm(facts)
        return
    yield from _group_divides(facts)
    yield from _multiples(facts, 32, 32)


def _exllamav2(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    size = facts.grid.group_size
    yield (
        facts.method == "compressed-tensors",
        "finds quantized linears by .qweight; compressed-tensors has none",
    )
    for name, bits in facts.bits.items():
        yield bits != 4, f"takes 4 bits; {name} is {bits}"
    yield (
        size != -1 and bool(size & (size - 1)),
        f"takes groups of a power of two; group_size is {size}",
    )
    if facts.method == "gptq_v2":
        yield (
            not facts.settings_in_config,
            "sees version 2 in config.json alone; quantization_config is missing there",
        )
        yield bool(facts.zero_zero), f"a zero of 0 wraps; {facts.zero_zero} has one"
    yield from _multiples(facts, 8, 32)


def _gptqmodel(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    yield (
        facts.method == "compressed-tensors",
        "reads the GPTQ format; this is compressed-tensors (export --to autogptq or gptq_v2)",
    )
    yield (
        facts.method == "gptq" and not facts.grid.symmetric,
        "refuses version 1 with sym false (export --to gptq_v2)",
    )
    yield facts.grid.group_size > 1024, f"group_size is {facts.grid.group_size}, above 1024"
    yield from _multiples(facts, 32, 32)


def _llama_cpp(facts: Facts) -> Iterator[Rule]:
    yield bool(facts.gguf_obstacle), facts.gguf_obstacle
    if facts.config is not None:
        grid = facts.grid
        yield bool(facts.shuffled), f"blocks are consecutive inputs; {facts.shuffled} is shuffled"
        for name, bits in facts.bits.items():
            yield (
                bits != 4 and not (bits == 8 and grid.symmetric),
                f"has blocks for 4 bits, and for 8 bits symmetric; {name} is {bits}"
                f"{'' if grid.symmetric else ', asymmetric'}",
            )
        yield from _multiples(facts, 1, 32)


def _marlin_groups(facts: Facts) -> Iterator[Rule]:
    for size in {own.group_size for own in (facts.grid, *dict(facts.grid.modules).values())}:
        taken = size in (-1, 32, 64, 128)
        yield not taken, f"takes groups of 32, 64, 128 or -1; group_size is {size}"
    yield from _group_divides(facts)


def _group_divides(facts: Facts) -> Iterator[Rule]:
    size = facts.grid.group_size
    for name, (_, in_features) in facts.shapes.items():
        yield (
            size > 0 and bool(in_features % size),
            f"group_size {size} does not divide in_features {in_features} of {name}",
        )


def _multiples(facts: Facts, out_multiple: int, in_multiple: int) -> Iterator[Rule]:
    """Both sides of every linear are such multiples."""
    for name, (out_features, in_features) in facts.shapes.items():
        yield (
            bool(out_features % out_multiple or in_features % in_multiple),
            f"needs multiples of {out_multiple} outputs and {in_multiple} inputs; {name} is "
            f"({out_features}, {in_features})",
        )


_GPTQ_PACKAGES = "with optimum >= 1.24 and gptqmodel >= 1.4.3 installed"
RUNTIMES: dict[str, tuple[Callable[[Facts], Iterator[Rule]], dict[str, str]]] = {
    "transformers": (
        _transformers,
        {
            "gptq": _GPTQ_PACKAGES,
            "gptq_v2": _GPTQ_PACKAGES,
            "compressed-tensors": "with compressed-tensors >= 0.15 installed",
        },
    ),
    "vllm": (_vllm, {}),
    "sglang": (_sglang, {}),
    "exllamav2": (_exllamav2, {}),
    "gptqmodel": (_gptqmodel, {}),
    "llama.cpp": (
        _llama_cpp,
        dict.fromkeys(
            ("gptq", "gptq_v2", "compressed-tensors", "awq", "float"), "through export --to gguf"
        ),
    ),
}
