"""state.json: what of a run is durable, in the folder it works in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint import read_json
from quant.checkpoint_writer import Part
from quant.durable import write_file
from quant.fingerprint import difference, other_words
from quant.partial import STATE


@dataclass
class Finished:
    """One layer: its files, what the report says of it, and the digests of its linears."""

    parts: list[Part]
    report: dict[str, Any]
    digests: dict[str, str]


@dataclass
class RunState:
    """What the file holds.

    Attributes:
        fingerprint: what a run must have in common with the one it continues.
        words: the options of the command line, by name, that decide its numbers.
        machine: on which it began, see quant.fingerprint.
        layers: the finished ones; one more record follows for the embedding, norm and head.
        damaged: the run stopped at a damaged layer; it may be continued with other weights.
        hidden: (layers before it, file) of the hidden states kept.
        shards: what parts were joined to.
        own_windows: the file of those that the model wrote to calibrate on, if it wrote some.
    """

    fingerprint: dict[str, Any]
    words: dict[str, str]
    machine: dict[str, Any]
    layers: list[Finished]
    damaged: bool
    hidden: dict[int, Part]
    shards: list[Part]
    own_windows: Part | None

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """What `write` wrote there.

        Raises:
            ValueError: it is damaged.
        """
        file = folder / STATE
        try:
            state = read_json(file)
            for one in state["layers"]:
                one["parts"] = [Part(**part) for part in one["parts"]]
            return cls(
                fingerprint=dict(state["fingerprint"]),
                words=dict(state["words"]),
                machine=dict(state["machine"]),
                layers=[Finished(**one) for one in state["layers"]],
                damaged=state["damaged"],
                hidden={int(key): Part(**part) for key, part in state["hidden"].items()},
                shards=[Part(**shard) for shard in state["shards"]],
                own_windows=Part(**own) if (own := state["own_windows"]) else None,
            )
        except ValueError as error:
            raise ValueError(f"{error}; pass --overwrite to start again") from None
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{file}: is not what a run writes there; pass --overwrite to start again"
            ) from None

    def refuse_other(
        self, folder: Path, fingerprint: dict[str, Any], words: dict[str, str]
    ) -> None:
        """Refuse to continue with another fingerprint, and say what differs: in `words` if that is
        where it does.

        Raises:
            ValueError: it is another.
        """
        if changed := difference(self.fingerprint, fingerprint):
            raise ValueError(
                f"{folder}: cannot be continued, {other_words(self.words, words) or changed}; "
                "change it back, or pass --overwrite to start again"
            )

    def write(self, folder: Path) -> None:
        """Make the file durable."""
        text = json.dumps(asdict(self)).encode()

        def write(path: Path) -> None:
            path.write_bytes(text)

        write_file(folder / STATE, write)
