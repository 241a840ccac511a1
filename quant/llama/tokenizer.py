"""Text <-> token ids, as Llama 2 does it.

`tokenizer.model` (sentencepiece, byte-pair pieces with byte fallback) comes first; a folder without
one is read through its `tokenizer.json`. Sentencepiece never adds BOS itself, so it is added here.

Decoding ids one by one would lose every leading space and split characters of several bytes. A
stream therefore decodes from the start of the current line of ids and gives out what has become new
and whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that are no whole character yet
_CONTEXT = 32  # ids that are decoded again in front of a new one


class _Codec(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """A tokenizer with the ids a language model needs.

    Attributes:
        vocab_size: number of ids.
        bos_id: id put in front of a text, or None.
        eos_ids: ids that end a text.
    """

    def __init__(
        self, codec: _Codec, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...]
    ) -> None:
        self._codec, self.vocab_size, self.bos_id, self.eos_ids = codec, vocab_size, bos_id, eos_ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, behind BOS where the model has one and `bos` asks for it."""
        ids = list(self._codec.encode(text))
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; the space that sentencepiece puts before a text is dropped."""
        return self._codec.decode([i for i in ids if i < self.vocab_size])

    def stream(self, prompt: list[int]) -> Stream:
        """A stream of the text that follows `prompt`."""
        return Stream(self, prompt)


class Stream:
    """Text of ids as they come: whole characters only, no lost space."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._given = tokenizer.decode(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[-_CONTEXT:]
        self._given = self._tokenizer.decode(self._ids)
        return new

    def flush(self) -> str:
        """What is left when no more ids come."""
        return self._tokenizer.decode(self._ids)[len(self._given) :]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        ValueError: the folder has neither tokenizer.model nor tokenizer.json, or it is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder)
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder)
    raise ValueError(
        f"{folder}: no tokenizer; expected tokenizer.model or tokenizer.json beside the weights"
    )


def _load_sentencepiece(folder: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (RuntimeError, OSError, UnicodeError) as error:
        raise ValueError(
            f"{folder / 'tokenizer.model'}: not a sentencepiece model ({error})"
        ) from None
    bos = sp.bos_id() if _settings(folder).get("add_bos_token", True) and sp.bos_id() >= 0 else None
    return Tokenizer(sp, sp.vocab_size(), bos, (sp.eos_id(),) if sp.eos_id() >= 0 else ())


class _FastCodec:
    """`tokenizers` behind the interface of sentencepiece."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        with _told_of(file):
            self.inner = FastTokenizer.from_file(str(file))
        self._file = file

    def encode(self, text: str) -> list[int]:
        with _told_of(self._file):
            return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with _told_of(self._file):
            return self.inner.decode(ids, skip_special_tokens=True)


@contextmanager
def _told_of(file: Path) -> Iterator[None]:
    """Turn what the library raises into a ValueError on the file: plain Exception, and for some
    damage a panic, which is a BaseException of a class that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file}: not a tokenizer file ({error})") from None


def _load_json(folder: Path) -> Tokenizer:
    codec = _FastCodec(folder / "tokenizer.json")
    inner, settings = codec.inner, _settings(folder)
    named = {key: _id_of(inner, settings.get(key)) for key in ("bos_token", "eos_token")}
    adds_bos = settings.get("add_bos_token", "Llama" in str(settings.get("tokenizer_class")))
    eos = named["eos_token"]
    return Tokenizer(
        codec,
        inner.get_vocab_size(),
        named["bos_token"] if adds_bos else None,
        () if eos is None else (eos,),
    )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing."""
    file = folder / "tokenizer_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _id_of(inner: Any, token: Any) -> int | None:
    """The id of a special token, given as a string or as {"content": string}."""
    content = token.get("content") if isinstance(token, dict) else token
    try:
        return inner.token_to_id(content) if isinstance(content, str) else None
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
