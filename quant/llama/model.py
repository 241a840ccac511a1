"""Llama 2 in one file, read from top to bottom.

A decoder layer is  x + o(attention(q, k, v of norm(x)))  and then  x + down(silu(gate(n)) * up(n))
with n = norm(x). Positions enter by rotating q and k (rotary embedding), and several query heads
may share one key/value head (GQA).

Module and parameter names are those of the Hugging Face checkpoint, so a file loads without a
rename table. Weights keep the dtype they are stored in; arithmetic is float32 on the CPU and the
storage dtype on a GPU, so that float16 weights cannot overflow where there is no float16 arithmetic
to gain from.

Letters: B batch, T tokens, S tokens with the cached ones, H heads, D head_dim. Semantics follow the
Llama model of transformers 5 (`models/llama`, `modeling_rope_utils`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.llama.cache import KVCache
from quant.llama.config import LlamaConfig
from quant.llama.positions import rotary_of_rows, rotate, visible
from quant.native import products

# Linears that share an input stand together: they share one Hessian and are solved as one stack.
LINEAR_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
# Where a quantized group stands as one matrix, its outputs one after another.
MERGED_NAMES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def _random(rows: int, columns: int, std: float) -> Tensor:
    """A normal matrix. On the meta device, where there is nothing to fill, filling would import
    torch's compiler: two seconds and 80 MB.
    """
    matrix = torch.empty(rows, columns)
    return matrix if matrix.is_meta else matrix.normal_(0, std)


class Linear(nn.Module):
    """y = x W^T + b with W in its storage dtype and the product in x's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(_random(out_features, in_features, in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return products.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bias = config.hidden_size, config.attention_bias
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj: nn.Module = Linear(hidden, width, bias)
        self.k_proj: nn.Module = Linear(hidden, kv_width, bias)
        self.v_proj: nn.Module = Linear(hidden, kv_width, bias)
        self.o_proj: nn.Module = Linear(width, hidden, bias)
        self.qkv_proj: nn.Module | None = None  # takes the place of the three
        self.widths = (width, kv_width, kv_width)

    def mix(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """The input of o_proj, (B, T, heads * D), from the normed x (B, T, hidden)."""
        config, start = self.config, cache.length if cache else 0
        B, T, _ = x.shape
        padding = cache.padding if cache else None
        cos, sin = rotary_of_rows(config, start, start + T, x.device, padding)
        q, k, v = (y.view(B, T, -1, config.head_dim).transpose(1, 2) for y in self._qkv(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache:
            k, v = cache.append(layer, k, v)  # (B, KV heads, S, D)
        if T == 1 and not padding:  # a token that sees all: its heads are rows of their k and v
            y = F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, config.head_dim), k, v)
            return y.reshape(B, 1, -1)
        repeats = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mask = visible(start, T, x.device, padding) if padding or (start and T > 1) else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return y.transpose(1, 2).reshape(B, T, -1)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv_proj is not None:
            return self.qkv_proj(x).split(self.widths, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        return self.o_proj(self.mix(x, cache, layer))


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj: nn.Module = Linear(hidden, width, bias)
        self.up_proj: nn.Module = Linear(hidden, width, bias)
        self.down_proj: nn.Module = Linear(width, hidden, bias)
        self.gate_up_proj: nn.Module | None = None  # takes the place of the two

    def mix(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The input of down_proj, (B, T, intermediate), from the normed x (B, T, hidden); written
        to `out` where that is given.
        """
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return torch.mul(F.silu(gate), up, out=out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.mix(x))


class DecoderLayer(nn.Module):
    """One block: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def linear(self, name: str) -> Linear:
        """The float linear of a name in LINEAR_GROUPS."""
        module = self.get_submodule(name)
        assert isinstance(module, Linear)
        return module

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        sizes = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*sizes, _weight=_random(*sizes, 1.0))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(ids).to(compute_dtype(self.embed_tokens.weight))
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index)
        if cache:
            cache.length += ids.shape[1]
        return self.norm(x)


class Llama(nn.Module):
    """The language model. `Llama(config)` is random in float32, and empty under
    `torch.device("meta")`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Let the head use the embedding's weight."""
        self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, vocab_size) float32; with a cache, ids follow the
        cached tokens.

        Raises:
            ValueError: ids have another shape.
        """
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected (batch, tokens)")
        return self.lm_head(self.model(ids, cache)).float()

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Tensor:
        """Continue ids (1, T) -> (1, T + new), ending before an end id; see `generate.py`."""
        from quant.llama.generate import Sampling, generate

        start: list[int] = ids.reshape(-1).tolist()
        sampling = Sampling(temperature, top_p, seed)
        new = generate(self, start, max_new_tokens, sampling, self.config.eos_token_ids)
        return torch.tensor([start + list(new)], device=ids.device)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """float32 on the CPU; the storage dtype elsewhere."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype
