"""quantize_report.json: what was done to each linear, with which settings and data, and what it
cost.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.config import QuantConfig
from quant.fingerprint import own_version

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
    aim_error: float | None = None
    rtn_aim_error: float | None = None

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> LinearReport:
        """What `asdict` and JSON made of one."""
        return cls(**{**stored, "notes": tuple(stored["notes"])})

    @property
    def warnings(self) -> list[str]:
        """What the user should know about this linear, one line each."""
        lines = [f"{self.name}: {note}" for note in self.notes]
        what, mine, plain = "relative error", self.relative_error, self.rtn_relative_error
        if self.aim_error is not None and self.rtn_aim_error is not None:
            what, mine, plain = "error towards its aim", self.aim_error, self.rtn_aim_error
        if mine > plain * 1.0001:
            lines.append(f"{self.name}: {what} {mine:.3g} is above round-to-nearest's {plain:.3g}")
        if self.tokens < self.in_features:
            lines.append(
                f"{self.name}: {self.tokens} calibration tokens for {self.in_features} inputs; "
                "use more --samples"
            )
        return lines


@dataclass(frozen=True)
class Report:
    """The whole run."""

    model: str
    output: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None
    versions: dict[str, str]
    linears: tuple[LinearReport, ...]
    forecast: dict[str, float] | None = None

    @classmethod
    def of_run(
        cls,
        model: Path,
        output: Path,
        config: QuantConfig,
        settings: dict[str, Any],
        windows: Tensor,
        linears: list[LinearReport],
        start: float,
    ) -> Report:
        """Collect the facts of a run that began at `start` (time.perf_counter)."""
        data_hash = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        shape = {"windows": windows.shape[0], "seq_len": windows.shape[1], "sha256": data_hash}
        return cls(
            model=str(model.resolve()),
            output=str(output.resolve()),
            settings={**asdict(config), **settings},
            calibration=shape,
            seconds=round(time.perf_counter() - start, 2),
            peak_memory_bytes=peak_memory_bytes(),
            versions={
                "llama-gptq": own_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            linears=tuple(linears),
        )

    def with_data(self, source: str) -> Report:
        """The same, with what the calibration windows are taken from."""
        return replace(self, calibration={**self.calibration, "source": source})

    @property
    def warnings(self) -> list[str]:
        return [line for linear in self.linears for line in linear.warnings]

    def summary(self) -> str:
        """The run in one line."""
        mine = sum(linear.relative_error for linear in self.linears) / len(self.linears)
        plain = sum(linear.rtn_relative_error for linear in self.linears) / len(self.linears)
        memory = (
            ""
            if self.peak_memory_bytes is None
            else f", peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        )
        errors = f"mean relative error {mine:.5f} (round-to-nearest {plain:.5f})"
        return f"{errors}, {self.seconds:.1f} s{memory}"

    def against_forecast(self) -> str:
        """Forecast and measured time and memory beside each other, in one line."""
        if self.forecast is None or self.peak_memory_bytes is None:
            return ""
        memory = self.forecast["peak_memory_bytes"] / 1e9
        return (
            f"forecast {self.forecast['seconds']:.1f} s, peak memory {memory:.2f} GB; "
            f"measured {self.seconds:.1f} s, {self.peak_memory_bytes / 1e9:.2f} GB"
        )

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def float_origin(folder: Path) -> Path | None:
    """The float checkpoint a quantized one was made from, if it still exists."""
    try:
        origin = Path(json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return origin if origin.exists() else None


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not tell.

    Linux is asked for VmHWM, because the peak of getrusage begins with that of the process which
    started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # type: ignore[attr-defined]
    return peak if sys.platform == "darwin" else peak * 1024
