"""The recipe of the bundled model: a small Llama 2 trained on the Python standard library.

    python quant/bundled/train.py --output DIR

Writes a Hugging Face folder: a sentencepiece vocabulary with byte fallback, the config, float16
weights, and `heldout.txt`, the text of modules that neither training nor calibration ever sees.
Matrices are trained with Muon (momentum, then an orthogonalised update), everything else with
AdamW; the rate rises for 50 steps and then falls linearly to zero. 10 million tokens, about four
passes over the text. Not imported by the package.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from calib.sources.stdlib import is_held_out, modules
from quant.llama.config import LlamaConfig
from quant.llama.model import Llama

HELD_OUT_CHARACTERS = 200_000
GEOMETRY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "torch_dtype": "float16",
}


def read(held_out: bool) -> list[str]:
    """The modules of one side of the split."""
    paths = [path for name, path in modules() if is_held_out(name) == held_out]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def train_tokenizer(texts: list[str], output: Path) -> sentencepiece.SentencePieceProcessor:
    """A BPE vocabulary of Llama 2's kind; lines keep their indentation."""
    model = io.BytesIO()
    lines = (
        line for text in texts for line in text.splitlines() if line.strip() and len(line) < 4000
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=GEOMETRY["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=0.9999,
        minloglevel=2,
    )
    (output / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_text_files(output: Path) -> None:
    """Config, tokenizer config and the held-out text."""
    (output / "config.json").write_text(json.dumps(GEOMETRY, indent=1) + "\n")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (output / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")
    tokenizer: dict[str, object] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    tokenizer.update({"add_bos_token": True, "add_eos_token": False, "legacy": False})
    (output / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    (output / "heldout.txt").write_text(
        "\n\n".join(read(held_out=True))[:HELD_OUT_CHARACTERS], encoding="utf-8"
    )


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest matrix with singular values near one, by a quintic Newton-Schulz iteration
    (Muon).
    """
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon:
    """Momentum 0.95 with orthogonalised updates for matrices."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, momentum in zip(self.parameters, self.momenta, strict=True):
            assert p.grad is not None
            momentum.mul_(0.95).add_(p.grad)
            update = (
                orthogonalise(p.grad + 0.95 * momentum) * max(1, p.shape[0] / p.shape[1]) ** 0.5
            )
            p.mul_(1 - 0.05 * rate).add_(update, alpha=-rate)
            p.grad = None


def held_out_loss(model: Llama, ids: Tensor, window: int = 512, windows: int = 40) -> float:
    """Mean cross-entropy per token on held-out windows."""
    batch = ids[: windows * window].view(-1, window)
    with torch.no_grad():
        losses = [F.cross_entropy(model(b[None])[0, :-1], b[1:]).item() for b in batch]
    return sum(losses) / len(losses)


def train(
    model: Llama, tokens: Tensor, held_out: Tensor, steps: int, length: int = 512, batch: int = 8
) -> None:
    """Train for `steps` batches of random windows of `length` tokens."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    muon = Muon(matrices)
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * (1 - step / steps)
        offsets = torch.randint(0, len(tokens) - length - 1, (batch,), generator=generator)
        windows = torch.stack([tokens[o : o + length + 1] for o in offsets.tolist()]).long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        muon.step(0.02 * rate)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * rate
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 100 == 0:
            score = held_out_loss(model, held_out)
            print(
                f"step {step} of {steps}: {step * batch * length / 1e6:.2f}M tokens, loss "
                f"{loss.item():.3f}, "
                f"held-out {score:.3f}, perplexity {math.exp(score):.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2500, help="batches of 4096 tokens")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts = read(held_out=False)
    tokenizer = train_tokenizer(texts, args.output)
    write_text_files(args.output)
    tokens = torch.tensor(
        [i for text in texts for i in [1, *tokenizer.encode(text)]], dtype=torch.int16
    )
    held_out = torch.tensor(
        [1, *tokenizer.encode((args.output / "heldout.txt").read_text(encoding="utf-8"))]
    )
    torch.manual_seed(0)
    model = Llama(LlamaConfig.from_dict(GEOMETRY))
    print(
        f"{len(tokens) / 1e6:.2f}M tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    )
    train(model, tokens, held_out, args.steps)
    print(f"final held-out perplexity {math.exp(held_out_loss(model, held_out)):.3f}")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
