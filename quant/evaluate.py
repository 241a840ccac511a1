"""How good a model is: perplexity, and against a reference also KL divergence and top-1 agreement.

The protocol is that of the GPTQ paper: the whole text is tokenized once, with one BOS in front of
all of it; windows do not overlap and the rest is dropped; within a window every token but the first
is predicted; perplexity is exp of the mean over windows. Numbers of other protocols or window
lengths are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quant.llama.model import Llama

_BATCH_TOKENS = (
    4096  # tokens through the layers at a time: converting their weights is then a small part
)
_LOGIT_ELEMENTS = 1 << 25  # logits at a time: 128 MB in float32


@dataclass(frozen=True)
class Comparison:
    """Against a reference on the same tokens. KL is of the reference's distribution from the
    model's, in nats.
    """

    perplexity: float
    ratio: float
    nll_difference: float
    nll_difference_standard_error: float
    kl_mean: float
    kl_99th_percentile: float
    top1_agreement: float


@dataclass(frozen=True)
class EvalResult:
    """Perplexity with what is needed to compare it: `scored_tokens` predictions in `windows`
    windows.
    """

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
                f"float      {r.perplexity:.4f}   (quantized / float {r.ratio:.4f}; difference "
                "of the mean "
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
        model: the model to judge.
        ids: (tokens,) int64, the whole text.
        window: tokens per window.
        reference: the float model, for a comparison in the same run.
        on_window: called with (windows done, windows in all).

    Raises:
        ValueError: the text is shorter than one window, holds ids outside the vocabulary, or a
            model's logits are not finite; or the reference has another vocabulary.
    """
    if reference is not None:
        _check_vocabulary(model, reference)
    windows = _windows(ids, window, model.config.vocab_size).to(
        model.model.embed_tokens.weight.device
    )
    scores: list[Tensor] = []  # (4, windows, window - 1) a batch: the rows of _score
    done = 0
    with torch.inference_mode():
        for batch in windows.split(max(1, _BATCH_TOKENS // window)):
            scores.append(_score(model, reference, batch))
            _check_finite(scores[-1], done)
            done += len(batch)
            on_window(done, len(windows))
    nll, reference_nll, divergence, agreement = torch.cat(scores, dim=1)
    mine = nll.mean(-1)
    comparison = None
    if reference is not None:
        comparison = _compare(mine, reference_nll.mean(-1), divergence.flatten(), agreement)
    return EvalResult(math.exp(mine.mean().item()), len(windows), window, nll.numel(), comparison)


def _check_vocabulary(model: Llama, reference: Llama) -> None:
    """Refuse a reference whose predictions are of other tokens."""
    sizes = reference.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"reference: has a vocabulary of {sizes[0]}, the model one of {sizes[1]}; give the "
            "float checkpoint that it was made from"
        )


def _windows(ids: Tensor, window: int, vocab_size: int) -> Tensor:
    """The text in whole windows, (windows, window), after checking that it fits the model."""
    total = len(ids) // window if window > 1 else 0
    if not total:
        raise ValueError(
            f"evaluation text: {len(ids)} tokens are fewer than one window of {window}; use "
            "--window"
        )
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"evaluation text: token id {int(ids.max())} is outside the model's vocabulary of "
            f"{vocab_size}"
        )
    return ids[: total * window].view(total, window)


def _score(model: Llama, reference: Llama | None, batch: Tensor) -> Tensor:
    """Per predicted token: negative log-likelihood, the reference's, KL, same first choice.

    Args:
        batch: (windows, window) ids.

    Returns:
        (4, windows, window - 1) float64; zeros where there is no reference.
    """
    targets = batch[:, 1:].flatten()
    states = model.model(batch)[:, :-1].flatten(0, 1)  # (tokens, hidden)
    expected_states = None if reference is None else reference.model(batch)[:, :-1].flatten(0, 1)
    scores = torch.zeros(4, len(targets), dtype=torch.float64, device=batch.device)
    step = max(1, _LOGIT_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        log_probs = _log_probs(model, states[rows])
        scores[0, rows] = -log_probs.gather(1, targets[rows, None])[:, 0]
        if reference is not None and expected_states is not None:
            expected = _log_probs(reference, expected_states[rows])
            scores[1, rows] = -expected.gather(1, targets[rows, None])[:, 0]
            scores[3, rows] = (expected.argmax(-1) == log_probs.argmax(-1)).double()
            scores[2, rows] = log_probs.neg_().add_(expected).mul_(expected.exp_()).sum(-1)
    return scores.unflatten(1, (len(batch), -1))


def _check_finite(scores: Tensor, windows_before: int) -> None:
    """Raise ValueError if the scores (4, windows, tokens) of a batch are not numbers."""
    for whose, nll in zip(("model", "reference"), scores, strict=False):
        bad = ~torch.isfinite(nll).all(-1)
        if bad.any():
            window = windows_before + int(bad.int().argmax()) + 1
            raise ValueError(
                f"the {whose}'s logits are not finite in window {window}; its checkpoint is "
                "damaged, or it overflows"
            )


def _log_probs(model: Llama, states: Tensor) -> Tensor:
    """Log-probabilities (tokens, vocab) float64 from the final hidden states (tokens, hidden); a KL
    is a sum of terms that nearly cancel, of which float32 keeps three digits.
    """
    return torch.log_softmax(model.lm_head(states).double(), dim=-1)


def _compare(mine: Tensor, reference: Tensor, divergence: Tensor, agreement: Tensor) -> Comparison:
    """Statistics of two models over the same windows."""
    difference = mine - reference
    error = (
        difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    )
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
