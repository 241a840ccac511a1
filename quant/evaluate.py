"""How good a model is: perplexity, and against a reference also KL divergence and top-1 agreement.

The protocol is that of the GPTQ paper: the whole text is tokenized once, with one BOS in front of all of it; windows
do not overlap and the rest is dropped; within a window every token but the first is predicted; perplexity is exp of
the mean over windows. Numbers of other protocols or window lengths are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quant.llama.model import Llama

_LOGIT_ELEMENTS = 1 << 25  # logits of a batch of windows: 128 MB in float32


@dataclass(frozen=True)
class Comparison:
    """Against a reference on the same tokens. KL is of the reference's distribution from the model's, in nats."""

    perplexity: float
    ratio: float
    nll_difference: float
    nll_difference_standard_error: float
    kl_mean: float
    kl_99th_percentile: float
    top1_agreement: float


@dataclass(frozen=True)
class EvalResult:
    """Perplexity with what is needed to compare it: `scored_tokens` predictions in `windows` windows."""

    perplexity: float
    windows: int
    window: int
    scored_tokens: int
    reference: Comparison | None = None

    def summary(self) -> str:
        """The numbers as lines of text."""
        lines = [f"perplexity {self.perplexity:.4f}"]
        if self.reference is not None:
            r = self.reference
            lines += [
                f"float      {r.perplexity:.4f}   (quantized / float {r.ratio:.4f}; difference of the mean "
                f"log-likelihood {r.nll_difference:.5f} +- {r.nll_difference_standard_error:.5f})",
                f"KL         {r.kl_mean:.5f} mean, {r.kl_99th_percentile:.5f} 99th percentile",
                f"top-1      {r.top1_agreement:.2%} agreement",
            ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Llama,
    ids: Tensor,
    window: int = 2048,
    reference: Llama | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Evaluate a model on a text.

    Args:
        model: any model that gives float32 logits (B, T, vocab).
        ids: (tokens,) int64, the whole text.
        window: tokens per window.
        reference: the float model, for a comparison in the same run.
        on_window: called with (windows done, windows in all).

    Raises:
        ValueError: the text is shorter than one window, or holds ids outside the vocabulary.
    """
    total = len(ids) // window if window > 1 else 0
    if not total:
        raise ValueError(f"evaluation text: {len(ids)} tokens are fewer than one window of {window}; use --window")
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(
            f"evaluation text: token id {int(ids.max())} is outside the model's vocabulary of {model.config.vocab_size}"
        )
    device = model.model.embed_tokens.weight.device
    windows = ids[: total * window].view(total, window).to(device)
    step = max(1, _LOGIT_ELEMENTS // (window * model.config.vocab_size))
    nll, reference_nll, divergences, agreements = [], [], [], []
    with torch.inference_mode():
        for batch in windows.split(step):
            log_probs = _log_probs(model, batch)
            nll.append(_window_nll(log_probs, batch))
            if reference is not None:
                expected = _log_probs(reference, batch)
                reference_nll.append(_window_nll(expected, batch))
                agreements.append((expected.argmax(-1) == log_probs.argmax(-1)).float().flatten())
                divergences.append((expected.exp() * (expected - log_probs)).sum(-1).flatten())
            on_window(sum(map(len, nll)), total)
    mine = torch.cat(nll)
    comparison = None
    if reference is not None:
        comparison = _compare(mine, torch.cat(reference_nll), torch.cat(divergences), torch.cat(agreements))
    return EvalResult(math.exp(mine.mean().item()), total, window, total * (window - 1), comparison)


def _log_probs(model: Llama, batch: Tensor) -> Tensor:
    """Log-probabilities of the next token, (windows, window - 1, vocab)."""
    return torch.log_softmax(model(batch)[:, :-1].float(), dim=-1)


def _window_nll(log_probs: Tensor, batch: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, float64."""
    return -log_probs.gather(-1, batch[:, 1:, None])[..., 0].double().mean(-1)


def _compare(mine: Tensor, reference: Tensor, divergence: Tensor, agreement: Tensor) -> Comparison:
    """Statistics of two models over the same windows."""
    difference = mine - reference
    error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    rank = max(0, math.ceil(0.99 * len(divergence)) - 1)
    return Comparison(
        perplexity=math.exp(reference.mean().item()),
        ratio=math.exp(difference.mean().item()),
        nll_difference=difference.mean().item(),
        nll_difference_standard_error=error,
        kl_mean=divergence.double().mean().item(),
        kl_99th_percentile=divergence.sort().values[rank].item(),
        top1_agreement=agreement.mean().item(),
    )
