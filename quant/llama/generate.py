"""Generate ids one at a time with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.llama.cache import KVCache
from quant.llama.model import Llama, compute_dtype


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen.

    Attributes:
        temperature: 0 takes the most likely id; higher is more random.
        top_p: sample from the smallest set of ids that holds this much probability.
        seed: of a generator of its own; the global one is not touched.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature} is out of range; it is a finite number from 0, "
                "which takes the most likely token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p {self.top_p} is out of range; it is a probability, 0 < top_p <= 1"
            )


@torch.inference_mode()
def generate(
    model: Llama,
    ids: list[int],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that follow `ids`, stopping before an end id.

    Raises:
        ValueError: `ids` is empty, or an id is outside the vocabulary.
    """
    _check(model, ids)
    sampling = sampling or Sampling()
    embedding = model.model.embed_tokens.weight
    cache = KVCache(
        model.config, 1, len(ids) + max_new_tokens, embedding.device, compute_dtype(embedding)
    )
    generator = torch.Generator().manual_seed(sampling.seed)
    step = torch.tensor([ids], device=embedding.device)
    for _ in range(max_new_tokens):
        token = sample(model(step, cache)[0, -1].cpu(), sampling, generator)
        if token in eos_ids:
            return
        yield token
        step = torch.tensor([[token]], device=embedding.device)


@torch.inference_mode()
def generate_batch(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
) -> list[list[int]]:
    """The ids that follow each prompt, all rows in one pass and each as it would be alone.

    Shorter prompts are padded on the left. Which id fills the padding does not matter: no token
    sees it, and positions count from its end.

    Raises:
        ValueError: a prompt is empty, or an id is outside the vocabulary.
    """
    for ids in prompts:
        _check(model, ids)
    sampling, embedding = sampling or Sampling(), model.model.embed_tokens.weight
    longest = max((len(ids) for ids in prompts), default=0)
    cache = KVCache(
        model.config, len(prompts), longest + max_new_tokens, embedding.device,
        compute_dtype(embedding),
    )  # fmt: skip
    cache.padding = tuple(longest - len(ids) for ids in prompts)
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    step = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_new_tokens if prompts else 0):
        logits = model(step.to(embedding.device), cache)[:, -1].cpu()
        tokens = [sample(row, sampling, generators[i]) for i, row in enumerate(logits)]
        open_rows -= {row for row in open_rows if tokens[row] in eos_ids}
        if not open_rows:
            break
        for row in open_rows:
            new[row].append(tokens[row])
        step = torch.tensor(tokens)[:, None]
    return new


def _check(model: Llama, ids: list[int]) -> None:
    """Raise ValueError for a prompt that the model cannot read."""
    if not ids:
        raise ValueError("generate: the prompt holds no tokens")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"generate: token id {max(ids)} is outside the model's vocabulary of "
            f"{model.config.vocab_size}"
        )


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits (vocab,) float32.

    Raises:
        ValueError: they are not finite.
    """
    if not torch.isfinite(logits).all():
        raise ValueError(
            "generate: the model's logits are not finite; its checkpoint is damaged, or it "
            "overflows"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def drawn(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """One id for each row: the one whose share of [0, 1), by its probability and in the order of
    ids, holds the row's number. Many times faster than torch.multinomial on the CPU, which draws a
    number for every id.

    Args:
        probabilities: (rows, vocab).
        numbers: (rows, 1) in [0, 1).

    Returns:
        (rows, 1) int64.
    """
    upto = probabilities.cumsum(-1)
    ids = torch.searchsorted(upto, numbers.to(upto.device) * upto[:, -1:], right=True)
    return ids.clamp_(max=upto.shape[1] - 1)
