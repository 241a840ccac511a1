"""Rebuild tokenizer.model, the file of sentencepiece, from a plain list of pieces.

The file is one protocol buffer message (sentencepiece_model.proto of the library). Of its fields
only those that decide encoding and decoding are written. A field is its number and wire type in
one varint, then the value: a varint (0), bytes with their length (2) or four bytes (5).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """A token: its text with U+2581 for a space, its score, and one of the types above."""

    text: str
    score: float
    kind: int


def build(pieces: Sequence[Piece], bos: int, eos: int, add_dummy_prefix: bool = True) -> bytes:
    """The bytes of tokenizer.model: byte-pair pieces with byte fallback, text not normalized.

    Args:
        pieces: by id; one of kind UNKNOWN.
        bos: id that begins a text.
        eos: id that ends one.
        add_dummy_prefix: a space is put before a text.

    Raises:
        ValueError: no piece or more than one is of kind UNKNOWN.
    """
    unknown = [index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"the vocabulary has {len(unknown)} unknown tokens; it must have one")
    trainer = (
        _number(3, _BPE)
        + _number(4, len(pieces))
        + _number(35, any(piece.kind == BYTE for piece in pieces))
        + _number(40, unknown[0])
        + _number(41, bos)
        + _number(42, eos)
        + _number(43, (1 << 64) - 1)  # no padding: -1
        + _bytes(44, " \u2047 ".encode())
    )
    normalizer = _bytes(1, b"identity") + _number(3, add_dummy_prefix) + _number(4, False)
    body = [_bytes(1, _piece(piece)) for piece in pieces]
    return b"".join([*body, _bytes(2, trainer), _bytes(3, normalizer)])


def _piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | 5) + struct.pack("<f", piece.score)
    return _bytes(1, piece.text.encode()) + score + _number(3, piece.kind)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
