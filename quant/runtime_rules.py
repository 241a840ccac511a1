"""The rules of each runtime's loader, and what they look at.

They were read from the sources of transformers 5, vLLM and SGLang of mid-2026, GPTQModel of August
2026 and ExLlamaV2 of December 2025; llama.cpp is meant through `export --to gguf`. Other versions
may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quant.config import QuantConfig


@dataclass(frozen=True)
class Facts:
    """What the loaders look at.

    Attributes:
        method: "gptq", "gptq_v2", "compressed-tensors", "awq", "float", or what is no folder of
            Hugging Face: "gguf", "meta", "llama2c".
        config: the stored grid; None where there is none.
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


Rule = tuple[bool, str]  # whether the rule is broken, and how


def transformers(facts: Facts) -> Iterator[Rule]:
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


def vllm(facts: Facts) -> Iterator[Rule]:
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


def sglang(facts: Facts) -> Iterator[Rule]:
    if facts.method == "float":
        return
    yield facts.repeated_head, "fails on a tied head that is stored again; lm_head.weight is there"
    if facts.method == "compressed-tensors":
        yield from vllm(facts)
        return
    yield from _group_divides(facts)
    yield from _multiples(facts, 32, 32)


def exllamav2(facts: Facts) -> Iterator[Rule]:
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


def gptqmodel(facts: Facts) -> Iterator[Rule]:
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


def llama_cpp(facts: Facts) -> Iterator[Rule]:
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
