"""What a checkpoint is, and what quantizing it will take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from quant.checkpoint import CheckpointReader, StoredType, coarse_linear, llama_config, module_names
from quant.config import QuantConfig
from quant.formats import FORMATS
from quant.formats.gguf_vocabulary import vocabulary
from quant.geometry import linear_shapes, usual_group_size
from quant.llama.config import LlamaConfig
from quant.packing import unpack
from quant.plan import job_of, make_plan
from quant.runtime_rules import Facts
from quant.runtimes import Verdict, verdicts
from quant.solvers.gptq_options import EFFORTS
from quant.sources import open_checkpoint, source_name
from quant.units import size


def describe(path: Path) -> dict[str, str]:
    """Facts of a checkpoint by name, ready to print.

    Raises:
        ValueError: not a Llama checkpoint, or damaged.
    """
    reader = open_checkpoint(path)
    llama = llama_config(reader)
    linears = (
        sum(out * width for out, width in linear_shapes(llama).values()) * llama.num_hidden_layers
    )
    heads = 1 if llama.tie_word_embeddings else 2
    parameters = linears + heads * llama.vocab_size * llama.hidden_size
    parameters += (2 * llama.num_hidden_layers + 1) * llama.hidden_size
    facts = {
        "model": f"{reader.config.get('model_type')}, {llama.num_hidden_layers} layers",
        "hidden, intermediate": f"{llama.hidden_size}, {llama.intermediate_size}",
        "heads, kv heads, dim": f"{llama.num_attention_heads}, {llama.num_key_value_heads}, "
        f"{llama.head_dim}",
        "vocabulary": f"{llama.vocab_size}{', tied head' if llama.tie_word_embeddings else ''}",
        "parameters": f"{parameters / 1e6:.1f} M",
        "size on disk": size(reader.size_bytes),
        "bits per weight": f"{reader.size_bytes * 8 / parameters:.2f} over all parameters",
    }
    form, types = _form(reader), reader.stored_types()
    if form in FORMATS:
        config = FORMATS[form].quant_config(reader)
        kind = "symmetric" if config.symmetric else "asymmetric"
        return facts | {
            "format": form,
            "grid": f"{config.bits} bits, group size {config.group_size}, {kind}",
            **_other_grids(config),
        }
    facts["format"] = _FILES[form]
    if types:
        facts["tensor types"] = _counted(types)
    if coarse_linear(reader):
        return facts | {"to quantize": "no: it is quantized already"}
    return facts | _cost(reader, llama)


_FILES = {
    "huggingface": "float",
    "meta": "float, Meta's release",
    "llama2c": "llama2.c file",
    "gguf": "GGUF file",
}


def _form(reader: CheckpointReader) -> str:
    """One of FORMATS, else one of SOURCES."""
    form = next((name for name, form in FORMATS.items() if form.matches(reader)), None)
    return form or source_name(reader.path)


def _counted(types: dict[str, StoredType]) -> str:
    """How many tensors there are of each type, most frequent first."""
    counts = Counter(types.values())
    told = (f"{count} {type.name} ({type.bits:g} bits)" for type, count in counts.most_common())
    return ", ".join(told)


def _other_grids(config: QuantConfig) -> dict[str, str]:
    """The linears that have another grid, counted by it."""
    counts = Counter((own.bits, own.group_size) for _, own in config.modules)
    told = [
        f"{count} linears with {bits} bits, group size {width}"
        for (bits, width), count in sorted(counts.items())
    ]
    head = ["lm_head is quantized"] if config.has_head else []
    return {"other grids": "; ".join(told + head)} if told else {}


def will_it_load(path: Path) -> list[Verdict]:
    """A verdict for each runtime, from the settings and the small tensors of the checkpoint.

    Raises:
        ValueError: not a Llama checkpoint, or damaged.
    """
    reader = open_checkpoint(path)
    llama = llama_config(reader)
    form = _form(reader)
    method = {"huggingface": "float"}.get(form, form)
    if form == "autogptq":
        method = FORMATS[form].checkpoint_format(reader)
    shapes = {f"model.layers.0.{name}": shape for name, shape in linear_shapes(llama).items()}
    config = FORMATS[form].quant_config(reader) if form in FORMATS else None
    if config and config.has_head:
        shapes["lm_head"] = llama.vocab_size, llama.hidden_size
    return verdicts(
        Facts(
            method,
            config,
            shapes,
            _shuffled(reader),
            _zero_zero(reader) if method == "gptq_v2" else "",
            bool(reader.config.get("quantization_config")),
            any(f"lm_head.{end}" in reader for end in ("qweight", "weight_packed")),
            llama.tie_word_embeddings and "lm_head.weight" in reader,
            "" if form == "gguf" else _gguf_obstacle(reader, llama),
        )
    )


def _shuffled(reader: CheckpointReader) -> str:
    """A linear whose groups are not consecutive inputs, or ""."""
    for suffix in (".g_idx", ".weight_g_idx"):
        for module in module_names(reader.names(), suffix):
            index = reader.tensor(module + suffix)
            if bool((index[1:] < index[:-1]).any()):
                return module
    return ""


def _zero_zero(reader: CheckpointReader) -> str:
    """A linear with a zero of 0, or ""."""
    config = FORMATS["autogptq"].quant_config(reader)
    for module in module_names(reader.names(), ".qzeros"):
        words, bits = reader.tensor(f"{module}.qzeros").T, config.of(module).bits
        if not unpack(words, bits, words.shape[0] * 32 // bits).all():
            return module
    return ""


def _gguf_obstacle(reader: CheckpointReader, llama: LlamaConfig) -> str:
    """Why llama.cpp cannot have the tokenizer, or ""."""
    try:
        with TemporaryDirectory() as folder:
            reader.copy_companions(Path(folder))
            vocabulary(Path(folder), llama.vocab_size)
    except ValueError as error:
        return str(error).replace(folder, str(reader.path))
    return ""


def _cost(reader: CheckpointReader, llama: LlamaConfig) -> dict[str, str]:
    """What quantizing with the defaults takes."""
    config = QuantConfig(4, usual_group_size(llama))
    windows = (128, min(2048, llama.max_position_embeddings))
    plan = make_plan(job_of(reader, llama, config, windows, EFFORTS["balanced"]))
    return {
        "to quantize": f"{plan.tokens} tokens by default, group size {config.group_size}",
        "memory, roughly": size(plan.memory),
        "output size": size(plan.output),
    }
