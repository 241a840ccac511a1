"""pytest tests/test_model.py: logits against transformers, for every feature of the config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant.llama.cache import KVCache
from quant.llama.config import LlamaConfig
from quant.llama.generate import Sampling, drawn, generate, sample
from quant.llama.model import Llama

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}
FEATURES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}


def pair(**features: Any) -> tuple[Llama, Any, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**BASE, **features})
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    raw = config.to_dict()
    ours = Llama(LlamaConfig.from_dict(raw))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs, raw


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("length", [1, 17, 50])
def test_logits_equal_transformers(feature: str, length: int) -> None:
    ours, theirs, _ = pair(**FEATURES[feature])
    ids = torch.randint(0, 128, (2, length))
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_cached_steps_equal_one_pass() -> None:
    ours, _, _ = pair()
    ids = torch.randint(0, 128, (2, 20))
    cache = KVCache(ours.config, 2, 20)
    with torch.no_grad():
        steps = [ours(part, cache) for part in ids.split([7, 5, 1, 1, 6], dim=1)]
        expected = ours(ids)
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="KV cache holds 20 tokens, 21 are needed"):
        ours(ids[:, :1], cache)


def test_float16_weights_compute_in_float32() -> None:
    ours, _, _ = pair()
    for parameter in ours.parameters():
        parameter.data = parameter.data.half()
    ours.model.norm.weight.data *= 6e4  # overflows in float16
    with torch.no_grad():
        logits = ours(torch.randint(0, 128, (1, 9)))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a positive number"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; it must be a positive"),
        ({"rope_scaling": {"type": "linear"}}, "factor of linear rope is None; it must be a pos"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "factor of dynamic rope is 0; it mu"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"bos_token_id": 128}, "bos_token_id is 128, outside the vocabulary of vocab_size 128"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
    ],
)
def test_config_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**BASE, "model_type": "llama", **change})


def test_old_config_keys() -> None:
    raw = {
        **BASE,
        "model_type": "llama",
        "rope_theta": 7.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    raw |= {"eos_token_id": [2, 5], "pretraining_tp": 4}
    config = LlamaConfig.from_dict(raw)
    assert (config.rope_theta, config.rope_type, config.rope_factor) == (7.0, "linear", 2.0)
    assert config.eos_token_ids == (2, 5) and config.head_dim == 16


def test_greedy_generation_equals_transformers() -> None:
    ours, theirs, _ = pair()
    ids = [1, 5, 9]
    expected = theirs.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert list(generate(ours, ids, 12)) == expected[0, 3:].tolist()
    ours.config = replace(ours.config, eos_token_ids=())
    assert torch.equal(ours.generate(torch.tensor([ids]), max_new_tokens=12), expected)


def test_generation_stops_and_refuses() -> None:
    ours, _, _ = pair()
    first = next(generate(ours, [1], 1))
    assert list(generate(ours, [1], 5, eos_ids=[first])) == []
    with pytest.raises(ValueError, match="prompt holds no tokens"):
        list(generate(ours, []))
    with pytest.raises(ValueError, match="token id 128 is outside the model's vocabulary of 128"):
        list(generate(ours, [128]))
    with pytest.raises(ValueError, match="temperature -1"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="top_p 0"):
        Sampling(top_p=0)


def test_top_p_keeps_the_smallest_set() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(logits, Sampling(1.0, 0.6), generator) for _ in range(200)}
    assert drawn == {0, 1}


def test_ids_are_drawn_by_their_shares() -> None:
    """The ends of each share, and the last id where rounding leaves a little above all shares."""
    probabilities = torch.tensor([[0.25, 0.5, 0, 0.25]]).repeat(6, 1)
    numbers = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 0.9999])[:, None]
    assert drawn(probabilities, numbers).flatten().tolist() == [0, 0, 1, 1, 3, 3]
    many = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    counts = drawn(probabilities[:1].expand(20_000, 4), many).flatten().bincount(minlength=4)
    assert (counts / 20_000 - probabilities[0]).abs().max() < 0.02 and counts[2] == 0
    assert drawn(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0]])).item() == 1
