"""What a run has to do, counted from the geometry. With T tokens, P weights of a layer,
input widths n (one for each group of linears that share an input) and r rows on each, a layer takes

    forward    2 P T, gate and up twice where their product is not kept, and 2 P for each of the
               tokens by which sizes are moved
    attention  2 T seq_len width, causal
    Hessian    n^2 T, one triangle
    Cholesky   n^3 / 3
    solve      r n^2 for the columns, for the energy of W (unless a refit tells it) and for that of
               every error in the report; 2 r n^2 for a sweep, 3 r n^2 for a refit (E H, and half as
               much for A)

Gradients of T' tokens take 10 P T' (forward, back, and back again when the layer's turn has come),
4 V T' width for a head of V rows, and of each linear with r outputs r^2 T' for their covariance,
r^3 / 3 to factor it and r^2 n for the feedback between rows; that leaves a solver without the loss,
which takes r n^2.

Where the float model runs beside the quantized one, forward and attention count twice, but gate and
up of the float model once. Its drift adds 2 n^2 T to a Hessian and its lag 2 r n T; to aim takes a
second Cholesky, 2 r n^2 to multiply W by the drift and 2 r n^2 to solve, and errors are told from W
and from the aim.

To write windows takes 2 operations a weight and token, the head's among them.

Not all of it runs at the rate of a large product: the costs below say how much longer each part
takes, read off `benchmarks/parts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calib.capture import Budget
from calib.hidden import Storage
from quant.config import QuantConfig
from quant.geometry import linear_shapes
from quant.llama.config import LlamaConfig
from quant.llama.model import LINEAR_GROUPS
from quant.solvers.row_feedback import rows_at_a_time

COSTS = {
    "forward": 1.2,
    "attention": 5.0,
    "Hessian": 1.3,
    "Cholesky": 1.3,
    "solve": 1.3,
    "gradients": 1.5,
    "writing": 2.0,
}
# Operations in the time of
_ELEMENT_COST = 600  # one activation through norms and SiLU
_WEIGHT_COST = 4500  # one weight through a step of its solve, beside the products
_PIECE_COST = 2_000_000_000  # the rows of a weight that are solved at a time, beside the rest
_SQUARE_COST = 15  # one of the squares on the diagonal that LAPACK factors,
_SQUARE = 512  # of which each has so many columns
# Seconds that a GPU waits: for the steps of a column of a block, and for the machine to pack, hash
# and read back a weight, and to write, hash and join a byte of the output.
_COLUMN_S, _WEIGHT_S, _BYTE_S = 11.5e-6, 3.5e-9, 4.1e-9


@dataclass(frozen=True)
class Job:
    """What is planned: a model of `weight_bytes` per weight, windows, how they are held,
    whether the float model runs beside the quantized one, the sweeps and refits of every solve, the
    tokens whose gradients are taken, how many of the windows the model writes itself, the tokens
    by which sizes are moved within a layer, where layers are computed, and how many processes do as
    much, in all and on this machine.
    """

    llama: LlamaConfig
    config: QuantConfig
    windows: int
    seq_len: int
    weight_bytes: float
    storage: Storage = Storage()  # noqa: RUF009 - frozen
    budget: Budget = Budget()  # noqa: RUF009 - frozen
    beside: bool = False
    sweeps: int = 0
    refits: int = 0
    fisher: int = 0
    own: int = 0
    equalized: int = 0
    device: str = "cpu"
    processes: int = 1
    here: int = 1

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len

    @property
    def looked_at(self) -> int:
        """Tokens whose gradients are taken."""
        windows = min(self.windows, max(1, self.fisher // self.seq_len))
        return windows * self.seq_len if self.fisher else 0


@dataclass(frozen=True)
class Group:
    """Linears that share an input: their rows together, its width, how many they are."""

    rows: int
    width: int
    linears: int


def groups_of(llama: LlamaConfig) -> list[Group]:
    """The groups of one layer, in the order of LINEAR_GROUPS."""
    shapes = linear_shapes(llama)
    return [
        Group(sum(shapes[name][0] for name in names), shapes[names[0]][1], len(names))
        for names in LINEAR_GROUPS
    ]


def weights_of(llama: LlamaConfig) -> int:
    """Weights of the linears of one layer."""
    return sum(group.rows * group.width for group in groups_of(llama))


def work(job: Job) -> dict[str, float]:
    """Operations of the whole run, by part."""
    llama, tokens, groups = job.llama, job.tokens, groups_of(job.llama)
    wide = llama.num_attention_heads * llama.head_dim
    twice = 1 - kept_bytes(job) / down_bytes(job)  # of the product of gate and up
    again = 4 * llama.hidden_size * llama.intermediate_size * tokens * twice
    streams = 2 if job.beside else 1
    layer = {
        "forward": 2 * weights_of(llama) * (streams * tokens + job.equalized) + again,
        "attention": streams * 2 * tokens * job.seq_len * wide,
        "Hessian": sum(group.width**2 * tokens for group in groups),
        "Cholesky": streams * sum(group.width**3 / 3 for group in groups),
        "solve": sum(products(job) * group.rows * group.width**2 for group in groups),
    }
    if job.beside:
        layer["solve"] += sum(4 * group.rows * group.width**2 for group in groups[:-1])
        layer["solve"] += 2 * groups[-1].rows * groups[-1].width ** 2  # no drift
        layer["Hessian"] += sum(2 * group.width**2 * tokens for group in groups[:-1])
        layer["Hessian"] += sum(2 * group.rows * group.width * tokens for group in groups[1::2])
    if job.fisher:
        layer["gradients"] = _gradients(job)
        layer["solve"] += sum(group.rows * group.width**2 for group in groups)
        for rows, width in linear_shapes(llama).values():
            layer["Cholesky"] += rows**3 / 3
            layer["solve"] += rows**2 * width
    counts = {part: count * llama.num_hidden_layers for part, count in layer.items()}
    if job.fisher:
        counts["gradients"] += 4 * llama.vocab_size * llama.hidden_size * job.looked_at
    if job.own:
        model = weights_of(llama) * llama.num_hidden_layers + llama.vocab_size * llama.hidden_size
        counts["writing"] = 2 * model * job.own * job.seq_len
    if job.config.has_head:
        width, rows = llama.hidden_size, llama.vocab_size
        counts["Hessian"] += width**2 * tokens
        counts["Cholesky"] += width**3 / 3
        counts["solve"] += products(replace(job, beside=False)) * rows * width**2
    return counts


def _gradients(job: Job) -> float:
    """Operations of a layer."""
    outputs = sum(rows**2 for rows, _ in linear_shapes(job.llama).values())
    return job.looked_at * (10 * weights_of(job.llama) + outputs)


def products(job: Job) -> int:
    """Times r n^2 of a solve, the aim left out."""
    judged = 4 if job.beside else 1  # a solver knows what it loses, but not of the float weight
    if not job.beside and not job.refits:
        judged += 1  # the energy of W, which a refit tells
    return 1 + 2 * job.sweeps + 3 * job.refits + judged


def cost(job: Job) -> float:
    """Operations of a large product that take as long as all of the work."""
    llama, streams = job.llama, 2 if job.beside else 1
    squares = sum(min(g.width, _SQUARE) ** 2 * g.width for g in groups_of(llama)) * streams
    steps = 2 + job.sweeps + job.refits + streams - 1
    small = _SQUARE_COST * squares + _WEIGHT_COST * steps * weights_of(llama)
    if job.fisher:
        small += _PIECE_COST * pieces(job)
    small *= llama.num_hidden_layers
    if job.config.has_head:
        small += _WEIGHT_COST * steps * llama.vocab_size * llama.hidden_size
    large = sum(count * COSTS[part] for part, count in work(job).items())
    return large + small + _ELEMENT_COST * elements(job)


def pieces(job: Job) -> int:
    """How many times rows of a layer are solved that wait for others."""
    return sum(_pieces_of(rows) for rows, _ in linear_shapes(job.llama).values())


def _pieces_of(rows: int) -> int:
    """How many times rows of a linear are solved that wait for others."""
    return -(-rows // rows_at_a_time(rows))


def waiting(job: Job, output: float) -> float:
    """Seconds in which a GPU computes nothing large; `output` is the bytes of the checkpoint."""
    columns = sum(group.width for group in groups_of(job.llama))
    if job.fisher:
        shapes = linear_shapes(job.llama).values()
        columns = sum(width * _pieces_of(rows) for rows, width in shapes)
    layer = columns * (1 + job.sweeps) * _COLUMN_S + weights_of(job.llama) * _WEIGHT_S
    return layer * job.llama.num_hidden_layers + output * _BYTE_S if job.device != "cpu" else 0.0


def elements(job: Job) -> float:
    """Activations that pass through norms and SiLU."""
    llama = job.llama
    streams, twice = 2 if job.beside else 1, 1 - kept_bytes(job) / down_bytes(job)
    width = streams * 2 * llama.hidden_size + (streams + twice) * llama.intermediate_size
    return job.tokens * width * llama.num_hidden_layers


def down_bytes(job: Job) -> int:
    """Bytes of the input of down_proj."""
    return job.tokens * job.llama.intermediate_size * 4


def kept_bytes(job: Job) -> int:
    """What of it is kept rather than computed twice."""
    return min(down_bytes(job), job.budget.keep_bytes)
