"""WikiText-2, raw: the text of the GPTQ paper's perplexities."""

from __future__ import annotations

from collections.abc import Iterator

from calib.sources.downloads import texts


def documents(split: str = "train") -> Iterator[str]:
    """The split as one text, rows joined by blank lines as in the GPTQ paper's protocol.

    Raises:
        ValueError: it cannot be downloaded.
    """
    where = "Salesforce/wikitext", "wikitext-2-raw-v1"
    yield "\n\n".join(texts("wikitext2", f"wiki.{split}.raw", *where, split=split))
