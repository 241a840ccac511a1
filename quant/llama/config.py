"""LlamaConfig: the geometry and semantics of a Llama model, from `config.json` as transformers 4 or
5 writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

_LARGEST, _MOST_LAYERS = 1 << 24, 1 << 12


@dataclass(frozen=True)
class LlamaConfig:
    """Geometry and semantics of a Llama model; field names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Read `config.json` as written by transformers 4 or 5.

        Raises:
            ValueError: another model_type, activation or rope type, a missing or impossible size;
                each by name.
        """
        _refuse_other_models(raw)
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
        rope_theta, rope_type, rope_factor = _rope_settings(raw)
        eos = raw.get("eos_token_id", 2)
        config = cls(
            **{name: raw[name] for name in _REQUIRED},
            num_key_value_heads=_size(
                "num_key_value_heads", heads if kv_heads is None else kv_heads
            ),
            head_dim=_size("head_dim", hidden // heads if head_dim is None else head_dim),
            max_position_embeddings=_size(
                "max_position_embeddings", raw.get("max_position_embeddings", 2048), 1 << 31
            ),
            rms_norm_eps=_positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            rope_type=rope_type,
            rope_factor=rope_factor,
            **{name: _flag(name, raw.get(name)) for name in _FLAGS},
            bos_token_id=_ids("bos_token_id", raw.get("bos_token_id", 1))[0],
            eos_token_ids=tuple(i for i in _ids("eos_token_id", eos) if i is not None),
        )
        config._check_heads()
        if config.bos_token_id is not None and not 0 <= config.bos_token_id < config.vocab_size:
            raise ValueError(
                f"config.json: bos_token_id is {config.bos_token_id}, outside the vocabulary of "
                f"vocab_size {config.vocab_size}; correct one of them"
            )
        return config

    def _check_heads(self) -> None:
        """Raise ValueError for heads that cannot be rotated or shared."""
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; it cannot be rotated")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    """Raise ValueError naming what makes this config something else than a Llama we compute."""
    model_type = raw.get("model_type")
    if model_type != "llama":
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; this tool quantizes "
            "Llama models ('llama')"
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"config.json: hidden_act {activation!r} is not supported; Llama 2 uses 'silu'"
        )
    for name in _REQUIRED:
        _size(name, raw.get(name), _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST)


def _size(name: str, value: Any, most: int = _LARGEST) -> int:
    """The value, if it is a size that a model can have: a file that lies must not make us build a
    model of a million layers.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(
            f"config.json: {name} is {value!r:.40}; it must be a positive integer up to {most}"
        )
    return value


def _positive(name: str, value: Any) -> float:
    """The value, if it is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"config.json: {name} is {value!r:.40}; it must be a positive number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    """The value, if it is true or false; null is false."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {value!r:.40}; it must be true or false")
    return value is True


def _ids(name: str, value: Any) -> list[int | None]:
    """A token id, or several, as a list; null is no id."""
    ids = value if isinstance(value, list) and value else [value]
    if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
        raise ValueError(f"config.json: {name} is {value!r:.40}; it must be a token id, or a list")
    return ids


def _rope_settings(raw: Mapping[str, Any]) -> tuple[float, str, float]:
    """(theta, type, factor) from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (4).
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"config.json: rope settings are {parameters!r:.40}, not an object")
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ("default", "linear", "dynamic"):
        raise ValueError(
            f"config.json: rope type {rope_type!r} is not supported; supported are default, "
            "linear and dynamic"
        )
    theta = raw.get("rope_theta")
    if raw.get("rope_parameters") and parameters.get("rope_theta") is not None:
        theta = parameters["rope_theta"]
    theta = _positive("rope_theta", 10000.0 if theta is None else theta)
    if rope_type == "default":
        return theta, rope_type, 1.0
    return theta, rope_type, _positive(f"factor of {rope_type} rope", parameters.get("factor"))
