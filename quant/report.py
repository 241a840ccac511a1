"""quantize_report.json: what was done to each linear, with which settings and data, and what it
cost; what `eval` measured is added later.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import read_json
from quant.code_counts import CodeCounts
from quant.config import QuantConfig
from quant.durable import write_file
from quant.fingerprint import own_version
from quant.machine import peak_gpu_memory_bytes, peak_memory_bytes

FILE_NAME = "quantize_report.json"


@dataclass(frozen=True)
class LinearReport:
    """One linear. Errors are tr(E H E^T) / tr(W H W^T): the share of the output's energy that is
    lost. Where a target was aimed at, `aim_error` and `rtn_aim_error` are the distances from W*
    instead of W, and these are what is compared: a weight that undoes earlier errors lies further
    from W than it need.
    """

    name: str
    relative_error: float
    rtn_relative_error: float
    damp: float
    tokens: int
    in_features: int
    notes: tuple[str, ...] = ()
    counts: CodeCounts | None = None
    aim_error: float | None = None
    rtn_aim_error: float | None = None

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LinearReport:
        """What `asdict` and JSON made of one."""
        counts = stored.get("counts")
        counts = None if counts is None else CodeCounts.from_dict(counts)
        return cls(**{**stored, "notes": tuple(stored["notes"]), "counts": counts})

    @property
    def warnings(self) -> list[str]:
        """What the user should know about this linear, one line each."""
        lines = [f"{self.name}: {note}" for note in self.notes]
        what, mine, plain = "relative error", self.relative_error, self.rtn_relative_error
        if self.aim_error is not None and self.rtn_aim_error is not None:
            what, mine, plain = "error towards its aim", self.aim_error, self.rtn_aim_error
        if mine > plain * 1.0001:
            lines.append(f"{self.name}: {what} {mine:.3g} is above round-to-nearest's {plain:.3g}")
        if self.has_few_tokens:
            lines.append(
                f"{self.name}: {self.tokens} calibration tokens for {self.in_features} inputs; "
                "use more --samples"
            )
        return lines

    @property
    def has_few_tokens(self) -> bool:
        """Whether there were fewer tokens than the input is wide."""
        return self.tokens < self.in_features


@dataclass(frozen=True)
class LayerReport:
    """One layer, or the head: its linears, the time it took, the peak of memory until its end."""

    name: str
    linears: tuple[LinearReport, ...]
    seconds: float
    peak_memory_bytes: int | None

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LayerReport:
        """What `asdict` and JSON made of one."""
        linears = tuple(LinearReport.from_dict(linear) for linear in stored["linears"])
        return cls(**{**stored, "linears": linears})


@dataclass(frozen=True)
class Report:
    """The whole run.

    Attributes:
        layers: name, seconds and peak_memory_bytes of each layer, in order, and of a quantized
            head; those that an earlier run finished are as they were there.
        evaluations: what `eval` measured, one for each text and protocol.
        peak_gpu_memory_bytes: None where no GPU was used.
    """

    model: str
    output: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    linears: tuple[LinearReport, ...]
    forecast: dict[str, float] | None = None
    layers: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()
    peak_gpu_memory_bytes: int | None = None

    @classmethod
    def of_run(
        cls,
        model: Path,
        output: Path,
        config: QuantConfig,
        settings: dict[str, Any],
        windows: Tensor,
        layers: list[LayerReport],
        start: float,
    ) -> Report:
        """Collect the facts of a run that began at `start` (time.perf_counter)."""
        data_hash = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        shape = {"windows": windows.shape[0], "seq_len": windows.shape[1], "sha256": data_hash}
        return cls(
            model=str(model.resolve()),
            output=str(output.resolve()),
            settings={**config.settings(), **settings},
            calibration=shape,
            seconds=round(time.perf_counter() - start, 2),
            peak_memory_bytes=peak_memory_bytes(),
            peak_gpu_memory_bytes=peak_gpu_memory_bytes(),
            versions={
                "llama-gptq": own_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            linears=tuple(linear for layer in layers for linear in layer.linears),
            layers=tuple(
                {"name": o.name, "seconds": o.seconds, "peak_memory_bytes": o.peak_memory_bytes}
                for o in layers
            ),
        )

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of a checkpoint.

        Raises:
            ValueError: there is none, or it is not one of ours.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        if not (folder / FILE_NAME).is_file():
            raise ValueError(f"{folder}: has no {FILE_NAME}; only what `quantize` made has one")
        stored = read_json(folder / FILE_NAME)
        stored.pop("tuning", None)  # older reports tell of a step that is gone
        try:
            lists = {"linears": tuple(LinearReport.from_dict(d) for d in stored["linears"])}
            lists |= {key: tuple(stored.get(key, ())) for key in ("layers", "evaluations")}
            return cls(**{**stored, **lists})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / FILE_NAME}: not a report of this version ({error}); quantize again"
            ) from None

    def with_data(self, source: str) -> Report:
        """The same, with what the calibration windows are taken from."""
        return replace(self, calibration={**self.calibration, "source": source})

    def with_evaluation(self, measured: dict[str, Any]) -> Report:
        """The same, with what `eval` measured in place of an earlier result of that protocol."""
        kept = [old for old in self.evaluations if _protocol(old) != _protocol(measured)]
        return replace(self, evaluations=(*kept, measured))

    @property
    def warnings(self) -> list[str]:
        """Those of the linears; that there were few tokens is said of one of them."""
        few = [linear for linear in self.linears if linear.has_few_tokens]
        lines = [line for linear in self.linears for line in linear.warnings]
        repeated = {linear.warnings[-1] for linear in few[1:]}
        lines = [line for line in lines if line not in repeated]
        if repeated:
            lines.append(f"{len(repeated)} more linears have fewer calibration tokens than inputs")
        return lines

    def summary(self) -> str:
        """The run in one line."""
        mine = sum(linear.relative_error for linear in self.linears) / len(self.linears)
        plain = sum(linear.rtn_relative_error for linear in self.linears) / len(self.linears)
        memory = (
            ""
            if self.peak_memory_bytes is None
            else f", peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        ) + _of_gpu(self.peak_gpu_memory_bytes)
        errors = f"mean relative error {mine:.5f} (round-to-nearest {plain:.5f})"
        return f"{errors}, {self.seconds:.1f} s{memory}"

    def against_forecast(self) -> str:
        """Forecast and measured time and memory beside each other, in one line."""
        if self.forecast is None or self.peak_memory_bytes is None:
            return ""
        memory = self.forecast["peak_memory_bytes"] / 1e9
        gpu = _of_gpu(self.forecast.get("peak_gpu_memory_bytes"))
        return (
            f"forecast {self.forecast['seconds']:.1f} s, peak memory {memory:.2f} GB{gpu}; "
            f"measured {self.seconds:.1f} s, {self.peak_memory_bytes / 1e9:.2f} GB"
            + _of_gpu(self.peak_gpu_memory_bytes)
        )

    def write(self, folder: Path) -> None:
        """Write quantize_report.json, lists of numbers on one line."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        text = re.sub(r"\[[\s\d,]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        write_file(folder / FILE_NAME, lambda file: _write_text(file, text))


def _of_gpu(memory: float | None) -> str:
    """The peak of a GPU's memory in words, where one was used."""
    return f" and {memory / 1e9:.2f} GB of the GPU" if memory else ""


def _protocol(measured: dict[str, Any]) -> tuple[Any, ...]:
    """What two results must share to be of the same thing."""
    return tuple(measured.get(key) for key in ("sha256", "bos", "window", "precision"))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def float_origin(folder: Path) -> Path | None:
    """The float checkpoint a quantized one was made from, if it still exists."""
    try:
        origin = Path(json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return origin if origin.exists() else None
