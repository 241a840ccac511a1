"""Generate ids one at a time with a key/value cache."""

from __future__ import annotations

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
        if self.temperature < 0:
            raise ValueError(
                f"temperature {self.temperature} is negative; use 0 for the most likely token"
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
    if not ids:
        raise ValueError("generate: the prompt holds no tokens")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"generate: token id {max(ids)} is outside the model's vocabulary of "
            f"{model.config.vocab_size}"
        )
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


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id from logits (vocab,) float32."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
