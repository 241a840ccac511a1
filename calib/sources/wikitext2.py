"""WikiText-2, raw: the text of the GPTQ paper's perplexities, through Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterator


def documents(split: str = "train") -> Iterator[str]:
    """The split as one text, rows joined by blank lines as in the GPTQ paper's protocol.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
    except Exception as error:  # no network shows as any of a dozen types
        raise ValueError(
            f"wikitext2: cannot be downloaded ({type(error).__name__}); give a local file instead, "
            f"such as wiki.{split}.raw"
        ) from error
    yield "\n\n".join(rows)
