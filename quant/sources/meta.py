"""Meta's release: consolidated.*.pth, params.json, and tokenizer.model there or one folder up.

The shards are those of model parallelism (1 for 7B, 2 for 13B, 8 for 70B): each holds a slice of
every matrix, along the axis in `_AXES`, and the whole of every norm. They are memory-mapped, and
one tensor at a time is joined; q and k get Hugging Face's row order. `rope.freqs` is computed from
the settings and ignored. Layout: github.com/facebookresearch/llama, llama/model.py.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quant.checkpoint import read_json
from quant.sources.pickled import load_pickled
from quant.sources.translated import TranslatedReader
from quant.sources.translation import (
    LAYER_NAMES,
    model_config,
    positive,
    shapes,
    write_settings,
)

_TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The axis along which the shards of a matrix follow one another.
_AXES = {
    "embed_tokens": 1,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
}
_CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")


def matches(path: Path) -> bool:
    """Whether there is a folder with consolidated.*.pth."""
    return any(path.glob("consolidated.*.pth"))


class Reader(TranslatedReader):
    """Tensors of Meta's shards under Hugging Face names; see `quant.checkpoint`.

    Raises:
        ValueError: a shard is missing or damaged, or params.json does not fit the shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._paths = sorted(path.glob("consolidated.*.pth"))
        expected = [f"consolidated.{number:02d}.pth" for number in range(len(self._paths))]
        needed = [path / name for name in ("params.json", *expected)]
        if missing := [file for file in needed if not file.is_file()]:
            raise ValueError(f"{missing[0]}: file is missing; download it again")
        self._shards: list[dict[str, Tensor]] = []
        self._meta_names = self._translate()
        self.config = self._read_params()
        self._shapes = shapes(self.config)
        for name in self._shapes:
            if name not in self._meta_names:
                raise ValueError(f"{self._paths[0]}: the tensor of {name} is missing")

    def _stored(self, name: str) -> Tensor:
        """The tensor, joined from all shards.

        Raises:
            ValueError: its slices do not make the shape it must have.
        """
        weight, shape = self._join(name), self._shapes[name]
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{self.path}: {self._meta_names[name]} has shape {tuple(weight.shape)} in the "
                f"shards, {shape} by params.json"
            )
        return weight

    def release(self) -> None:
        """Unmap the shards."""
        self._shards = []

    def files(self) -> list[Path]:
        """All shards, by name."""
        return self._paths

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer.model, and write the settings that Hugging Face wants beside it."""
        for place in (self.path, self.path.resolve().parent):
            if (place / "tokenizer.model").is_file():
                shutil.copyfile(place / "tokenizer.model", folder / "tokenizer.model")
                break
        write_settings(folder, self.config)

    def _join(self, name: str) -> Tensor:
        """A tensor in Meta's row order."""
        pieces = [shard[self._meta_names[name]] for shard in self._open()]
        if pieces[0].dim() == 1:  # norms are repeated in every shard
            return pieces[0]
        axis = _AXES[name.split(".")[-2]]
        if name == "model.embed_tokens.weight" and pieces[0].shape[1] == self.config["hidden_size"]:
            axis = 0  # as Llama 3 has it
        if any(p.dtype != pieces[0].dtype or p.shape != pieces[0].shape for p in pieces):
            raise ValueError(f"{self.path}: the slices of {name} differ in dtype or shape")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _open(self) -> list[dict[str, Tensor]]:
        """The mapped shards; kept open."""
        if not self._shards:
            self._shards = [load_pickled(path) for path in self._paths]
        for path, shard in zip(self._paths, self._shards, strict=True):
            if shard.keys() != self._shards[0].keys():
                odd = sorted(shard.keys() ^ self._shards[0].keys())[0]
                raise ValueError(f"{path}: tensor {odd} is not in every shard")
        return self._shards

    def _translate(self) -> dict[str, str]:
        """Meta's name of every Hugging Face name."""
        ours = {}
        for name in self._open()[0]:
            start, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if name in _TOP_NAMES:
                ours[_TOP_NAMES[name]] = name
            elif start == "layers" and index.isdecimal() and inner in LAYER_NAMES:
                ours[f"model.layers.{index}.{LAYER_NAMES[inner]}"] = name
            elif not name.endswith("rope.freqs"):
                raise ValueError(f"{self._paths[0]}: tensor {name} is not one of a Llama 2")
        return ours

    def _read_params(self) -> dict[str, Any]:
        """config.json from params.json; vocabulary and FFN width are those of the tensors."""
        file = self.path / "params.json"
        params = read_json(file)
        params.setdefault("n_kv_heads", params.get("n_heads"))
        positive(file, params, "dim", "n_layers", "n_heads", "n_kv_heads")
        if params.get("use_scaled_rope") or params["dim"] % params["n_heads"]:
            raise ValueError(f"{file}: use_scaled_rope, or dim that n_heads does not divide")
        layers = sum(name.endswith(".q_proj.weight") for name in self._meta_names)
        if params["n_layers"] != layers:
            raise ValueError(
                f"{file}: n_layers is {params['n_layers']}, the shards have {layers} layers"
            )
        count, hidden = len(self._paths), params["dim"]
        embedding = self._matrix("model.embed_tokens.weight")
        rows = embedding.shape[0] * (count if embedding.shape[1] == hidden else 1)
        theta, eps = params.get("rope_theta", 10000.0), params.get("norm_eps", 1e-5)
        if not all(isinstance(value, int | float) and value > 0 for value in (theta, eps)):
            raise ValueError(f"{file}: rope_theta {theta!r} or norm_eps {eps!r} is not positive")
        sizes = {
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": self._matrix("model.layers.0.mlp.gate_proj.weight").shape[0]
            * count,
            "num_hidden_layers": layers,
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params["n_kv_heads"],
            "max_position_embeddings": params.get("max_seq_len")
            or (16384 if "rope_theta" in params else 4096),
            "rms_norm_eps": eps,
            "rope_theta": float(theta),
            "torch_dtype": str(embedding.dtype).removeprefix("torch."),
        }
        return model_config(sizes)

    def _matrix(self, name: str) -> Tensor:
        """The first shard's slice of a matrix."""
        meta_name = self._meta_names.get(name)
        if meta_name is None or self._open()[0][meta_name].dim() != 2:
            raise ValueError(f"{self._paths[0]}: the matrix of {name} is missing")
        return self._open()[0][meta_name]


def verify(path: Path) -> list[str]:
    """Compare the files of a release with the checksums that came with it; returns the names.

    Raises:
        ValueError: there is no checklist, or a file is missing or differs.
    """
    lists = [path / _CHECKLISTS[0], path.resolve().parent / _CHECKLISTS[1]]
    if not lists[0].is_file():
        raise ValueError(f"{lists[0]}: file is missing, so there is nothing to verify with")
    seen = []
    for checklist in (file for file in lists if file.is_file()):
        for line in checklist.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.strip().partition(" ")
            if digest:
                _compare(checklist, name.strip().lstrip("*"), digest)
                seen.append(name.strip())
    return seen


def _compare(checklist: Path, name: str, digest: str) -> None:
    """Raise ValueError unless the file beside the checklist has that MD5 sum."""
    file = checklist.parent / Path(name).name
    if not file.is_file():
        raise ValueError(f"{file}: is in {checklist.name} but missing; download it again")
    with file.open("rb") as stream:
        found = _md5(stream)
    if found != digest.lower():
        raise ValueError(f"{file}: MD5 is {found}, by {checklist.name} {digest}; download it again")


def _md5(stream: BinaryIO) -> str:
    """The MD5 sum of a file, which is read in pieces."""
    digest = hashlib.md5(usedforsecurity=False)
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
