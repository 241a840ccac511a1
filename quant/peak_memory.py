"""The memory of a run at its widest moment, counted at the solve of each group of linears.

Like quant.workload, for any geometry, before anything is read.
"""

from __future__ import annotations

from dataclasses import replace

from quant.geometry import linear_shapes, stored_bytes
from quant.own_windows import PIECE, bits_in_memory, piece_bytes, rows_at_a_time
from quant.slopes import BATCH_TOKENS, LOGITS
from quant.workload import Job, groups_of, kept_bytes, weights_of

_BASE_BYTES = 300_000_000  # Python, torch and what its products keep, the calibration text
_ID_BYTES = 700  # of the tokenizer, for each id: 34 MB of 49,152, measured
_GPU_BASE_BYTES = 1_250_000_000  # more of this machine's memory, for the GPU's libraries
_CHUNKS = 1_000_000_000  # of the GPU's memory: pieces of a weight in which scales are searched
_SQUARES = 2  # matrices of a group's width: the Hessian and its factor
_STACKS = 1.5  # of the shape that is solved: errors, and codes twice; one more where linears join
_GATHERED = 3072  # columns of a weight that are gathered or corrected at a time
_PULLED = 16  # rows as wide as the MLP that a token takes on the way back through a layer, measured
_RETURNED = 1 << 25  # pieces of a batch below this stay with the C library when they are freed
_ROUNDED_BYTES = 1 + 2 / 32  # a weight of 8 bits, with its share of a scale
_AIMING = 4  # matrices of a group's width while a weight is aimed: H and D, H damped, its factor


def states_bytes(job: Job) -> int:
    """Hidden states of two layer boundaries, or what a layer stores in their place; and of one in
    the float model, if it runs beside.
    """
    wide = job.llama.num_attention_heads * job.llama.head_dim
    held = 2 * max(job.llama.hidden_size, wide)
    if job.beside:
        held += job.llama.hidden_size
    return held * job.tokens * job.storage.dtype.itemsize


def kept_states_bytes(job: Job) -> int:
    """Hidden states of all processes at two layer boundaries, which the first one keeps on disk."""
    tokens = job.processes * job.tokens
    return 2 * tokens * job.llama.hidden_size * job.storage.dtype.itemsize


def own_windows_bytes(job: Job) -> int:
    """What the model wrote for all processes, in int64, kept as well."""
    return 8 * job.processes * job.own * job.seq_len


def slopes_bytes(job: Job) -> int:
    """Gradients at all layer boundaries: on a GPU, in a file, or in the memory of a process that
    has no folder.
    """
    return 2 * (job.llama.num_hidden_layers + 1) * job.looked_at * job.llama.hidden_size


def packed_bytes(job: Job) -> float:
    """The quantized linears of one layer, on average."""
    inside, _ = stored_bytes(job.llama, job.config, job.weight_bytes)
    return inside / job.llama.num_hidden_layers


def peak_bytes(job: Job) -> tuple[float, float]:
    """Memory at the widest moment, of the machine and of its GPU."""
    held = 0 if job.storage.spill else states_bytes(job)
    if job.here > 1 and job.storage == replace(job.storage, spill=None, device="cpu"):
        held += slopes_bytes(job)  # of each but the first
    checking = job.llama.vocab_size * job.llama.hidden_size * job.weight_bytes  # the mapped file
    base, solving = _base_bytes(job) + packed_bytes(job), _solving_bytes(job)
    if job.fisher:
        solving = max(solving, _slopes_at_work_bytes(job))
    if job.device == "cpu":
        return base + max(checking, solving + held), 0
    base += _GPU_BASE_BYTES
    reading = 1.25 * weights_of(job.llama) * job.weight_bytes  # a layer, and what is copied of it
    if job.storage.device == "cpu":
        return base + max(checking, reading + held), solving + _CHUNKS
    return base + max(checking, reading), solving + _CHUNKS + held + slopes_bytes(job)


def writing_bytes(job: Job) -> float:
    """Where the model writes: it as it is stored, with its head in float32, or with linears of 8
    bits; and keys and values.
    """
    if not job.own:
        return 0
    llama, head = job.llama, job.llama.vocab_size * job.llama.hidden_size
    linears = weights_of(llama) * llama.num_hidden_layers
    if bits_in_memory(job.device):
        model = head * job.weight_bytes + _ROUNDED_BYTES * (linears + head)
    else:
        stored = linears + head * (1 if llama.tie_word_embeddings else 2)
        model = stored * job.weight_bytes + 4 * head
    pieces = min(rows_at_a_time(llama, job.device), job.own * -(-job.seq_len // PIECE))
    return _base_bytes(job) + model + pieces * piece_bytes(llama)


def _base_bytes(job: Job) -> int:
    """What a process holds before it reads a weight."""
    return _BASE_BYTES + _ID_BYTES * job.llama.vocab_size


def _slopes_at_work_bytes(job: Job) -> float:
    """Of gradients: where they begin, the head as it is read and in float32, and of some tokens
    the logits, their softmax and what is drawn from it; in a layer, what it keeps on the way there
    and makes of that on the way back.
    """
    head = job.llama.vocab_size * job.llama.hidden_size
    logits = 3 * 4 * min(LOGITS, job.seq_len) * job.llama.vocab_size
    tokens = min(max(BATCH_TOKENS, job.seq_len), job.looked_at)
    layer = weights_of(job.llama) + _PULLED * tokens * job.llama.intermediate_size
    return max(head * (4 + job.weight_bytes) + logits, 4 * layer)


def _solving_bytes(job: Job) -> float:
    """What is held of a layer at its widest moment."""
    llama, groups = job.llama, groups_of(job.llama)
    moments = []
    mlp = sum(group.rows * group.width for group in groups[2:])
    tokens = min(max(job.budget.batch_tokens, job.seq_len), job.tokens)
    piece = 4 * tokens * llama.intermediate_size
    batch = 3 * piece
    freed = batch if piece < _RETURNED and job.device == "cpu" else 0
    for index, group in enumerate(groups):
        weights = mlp if index >= 2 else weights_of(llama)  # attention has gone by then
        beside = weights_of(llama) if job.beside else 0
        kept = kept_bytes(job) if index == 3 else 0
        stacks = (_STACKS + (group.linears > 1)) * group.rows * group.width
        solving = _SQUARES * group.width**2 + stacks + _GATHERED * group.rows
        if job.beside and index < 3:
            solving = max(_AIMING * group.width**2 + 2 * group.rows * group.width, solving)
        if job.fisher:  # G of all linears to come, and the factor of one
            outputs = [rows**2 for rows, _ in linear_shapes(llama).values()]
            weights += (sum(outputs) if index < 3 else outputs[-1]) + max(outputs)
        taking = group.width**2 + batch / 4
        moments.append(4 * (weights + beside + max(solving, taking)) + kept + freed)
    if job.config.has_head:
        width, rows = llama.hidden_size, llama.vocab_size
        solving = _SQUARES * width**2 + (_STACKS + 1) * rows * width + _GATHERED * rows
        moments.append(4 * solving)
    return max(moments)
