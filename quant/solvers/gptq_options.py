"""How GPTQ runs: its options, and the efforts that users choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace

SCALES = ("minmax", "weighted", "signed")


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ runs; none of it is visible in the file.

    Attributes:
        act_order: take columns by falling diag(H), else from left to right.
        damp: added to the diagonal of H, as a fraction of its mean.
        block_size: columns per block between two large updates.
        scales: how group grids are chosen, one of SCALES: "minmax" spans each group's range,
            "weighted" searches for the least error weighted by diag(H), "signed" the same with
            negative scales allowed in symmetric grids.
        shrink: how far H is taken to be its own diagonal, 0 to below 1; its other entries, known
            from few tokens of one kind of text, count so much less; see quant.solvers.factor.
        target: how far to aim at the float model's outputs rather than at the weights, 0 to 1; 0
            is off. Used by the pipeline, see quant.solvers.target.
        residual: the same of o_proj and down_proj and the float model's residual stream.
        sink: how much more often the first token of a window counts for q, k and v than any other,
            as a share of the window's tokens, since most attention goes to it; 0 is once. Used by
            the pipeline, see calib.capture.
        sweeps: passes of coordinate descent over the finished codes, see quant.solvers.sweeps.
        refits: of these, how many begin with scales refit to the codes, see quant.solvers.refit.
        fisher: tokens whose gradients tell which errors of a linear's outputs make up for each
            other; 0 is none. Used by the pipeline, see quant.slopes and quant.solvers.row_feedback.
        equalize: how far columns of o_proj and down_proj are brought to the size that their inputs
            call for, 0 to 1; 0 is off. Used by the pipeline, see quant.equalized.
        rotate: quantize the model in another basis of its residual stream, where its head does not
            repeat the embedding. Used by the pipeline, see quant.rotated.
        own: windows that the float model writes itself, added to those of the text. Used by the
            pipeline, see quant.own_windows.
    """

    act_order: bool = True
    damp: float = 0.01
    block_size: int = 128
    scales: str = "weighted"
    shrink: float = 0.0
    target: float = 0.0
    residual: float = 0.0
    sink: float = 0.0
    sweeps: int = 0
    refits: int = 0
    fisher: int = 0
    own: int = 0
    equalize: float = 0.0
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ValueError(
                f"scales {self.scales!r} is unknown; choose one of {', '.join(SCALES)}"
            )
        for name in ("target", "residual", "sink", "equalize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is out of range; 0 <= {name} <= 1")
        if not 0 <= self.refits <= self.sweeps:
            raise ValueError(
                f"refits {self.refits} and sweeps {self.sweeps} do not fit; 0 <= refits <= sweeps"
            )
        for name, unit in (("fisher", "tokens"), ("own", "windows")):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} {value} is out of range; it is a number of {unit}")
        if not 0 <= self.shrink < 1:
            raise ValueError(f"shrink {self.shrink} is out of range; 0 <= shrink < 1")
        if not 0 <= self.damp < 1:
            raise ValueError(
                f"damp {self.damp} is out of range; it is a fraction of the mean diagonal, 0 <= "
                "damp < 1"
            )

    @property
    def needs_float(self) -> bool:
        """Whether the float model has to run beside the quantized one."""
        return self.target > 0 or self.residual > 0 or self.fisher > 0


_EQUALIZE = 0.25  # half of what theory has: scales follow the largest weights, not the rms


def with_rotation(options: GPTQOptions) -> GPTQOptions:
    """The options with both steps that quantize an equal model of other weights."""
    return replace(options, rotate=True, equalize=_EQUALIZE)


_FAST = GPTQOptions(scales="signed", shrink=0.25, sink=0.2, sweeps=1, refits=1)
_BALANCED = replace(_FAST, sink=0.0, target=0.5, residual=0.5)  # a target needs no sink
_MAX = replace(  # windows of its own are data enough for a lower loss and a farther aim
    _BALANCED, target=1.0, sweeps=3, refits=3, fisher=16384, own=64, equalize=_EQUALIZE
)
EFFORTS = {"fast": _FAST, "balanced": _BALANCED, "max": _MAX}
