"""The model card: README.md of a quantized checkpoint, from what its own files say.

`write_card` is called by the run that makes a checkpoint, and again by `eval --card`, which adds
what it measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quant.checkpoint import read_json
from quant.durable import write_file
from quant.report import FILE_NAME as REPORT

FILE_NAME = "README.md"
_SECTION = "## Quality"
_ADAPTERS = (
    "those of the base model do not fit: its channels have other sizes here, or another basis"
)


def write_card(folder: Path, quality: str = "") -> None:
    """Write README.md into a quantized checkpoint.

    Args:
        folder: the checkpoint, with its quantize_report.json.
        quality: lines of an evaluation; those of the last one are kept if there are none.

    Raises:
        ValueError: the folder has no report or no config.json; or its README.md is not a card of
            ours, which is left alone.
        OSError: it cannot be written; the old one stays.
    """
    file = folder / FILE_NAME
    old = file.read_text(encoding="utf-8") if file.is_file() else ""
    if old and "llama-gptq" not in old:
        raise ValueError(f"{file}: was not written by this tool; it is left as it is")
    if not quality and _SECTION in old:
        quality = old.partition(f"{_SECTION}\n\n```\n")[2].partition("\n```")[0]
    report, config = read_json(folder / REPORT), read_json(folder / "config.json")
    text = _card(report, config, quality).encode()

    def write(path: Path) -> None:
        path.write_bytes(text)

    write_file(file, write)


def _card(report: dict[str, Any], config: dict[str, Any], quality: str) -> str:
    """The text of the card."""
    settings, name = report["settings"], Path(report["output"]).name
    base, hub_id = _base_model(report, config)
    group = "one group per row" if settings["group_size"] == -1 else settings["group_size"]
    errors = [linear["relative_error"] for linear in report["linears"]]
    rows = {
        "base model": base,
        "bits": settings["bits"],
        "group size": group,
        "zeros": "symmetric" if settings["symmetric"] else "asymmetric",
        **({"other grids": _others(settings["modules"])} if "modules" in settings else {}),
        "solver": _solver(settings),
        **({"adapters": _ADAPTERS} if _in_other_terms(settings) else {}),
        "calibration": _calibration(report["calibration"]),
        "mean relative error of a linear's output": f"{sum(errors) / len(errors):.5f}",
        "made with": ", ".join(f"{key} {value}" for key, value in report["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    front = ["library_name: transformers", "tags:", "- gptq", "- llama-gptq"]
    if hub_id:
        front += [f"base_model: {base}", "base_model_relation: quantized"]
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {name}",
        f"{base}, quantized to {settings['bits']} bits with llama-gptq.",
        f"| | |\n|---|---|\n{table}",
    ]
    if quality:
        parts.append(f"{_SECTION}\n\n```\n{quality}\n```")
    return "\n\n".join([*parts, _how_to_load(name)]) + "\n"


def _base_model(report: dict[str, Any], config: dict[str, Any]) -> tuple[str, bool]:
    """Name of the base model, and whether it is one of the hub; paths of a disk are not told."""
    stored = config.get("_name_or_path")
    if isinstance(stored, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", stored):
        return stored, True
    return Path(report["model"]).name, False


def _solver(settings: dict[str, Any]) -> str:
    """The solver with its options."""
    stored = ("bits", "group_size", "symmetric", "solver", "modules")
    options = [f"{key} {value}" for key, value in settings.items() if key not in stored]
    return ", ".join([settings["solver"], *options])


def _in_other_terms(settings: dict[str, Any]) -> bool:
    """Whether what was quantized is an equal model of other weights."""
    return bool(settings.get("equalize") or settings.get("rotate"))


def _others(modules: dict[str, dict[str, int]]) -> str:
    """The linears that have another grid."""
    if len(modules) > 3:
        return f"{len(modules)} linears, listed in quantize_report.json"
    grids = modules.items()
    return ", ".join(f"{n}: {g['bits']} bits, groups of {g['group_size']}" for n, g in grids)


def _calibration(calibration: dict[str, Any]) -> str:
    """The data in one line."""
    source = calibration.get("source")
    windows = f"{calibration['windows']} windows of {calibration['seq_len']} tokens"
    of = f" of {source}" if source else ""
    return f"{windows}{of} (sha256 of the tokens {calibration['sha256'][:12]})"


def _how_to_load(name: str) -> str:
    return f"""## How to load it

```python
from quant import load_quantized

model, tokenizer = load_quantized({json.dumps(name)})
```

It is a GPTQ checkpoint, and loads in other runtimes that read this format.
`python cli.py inspect {name}` says in which."""
