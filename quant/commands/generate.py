"""`generate`: continue a text."""

from __future__ import annotations

from typing import Annotated

import typer

from quant.commands.options import LARGEST_SEED, Device, Dtype, Model, Precision

SAMPLING = "Sampling"
Tokens = Annotated[
    int, typer.Option(help="Tokens to write at most.", rich_help_panel=SAMPLING, min=0)
]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most likely token.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float, typer.Option(help="Probability mass to sample from, 0 to 1.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the sampling.", min=0, max=LARGEST_SEED, rich_help_panel=SAMPLING),
]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "high",
) -> None:
    """Continue a text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt {prompt[:40]!a}: character {error.start + 1} is not UTF-8; give UTF-8 text"
        ) from None
    from quant.llama import generate as generation
    from quant.loader import load_model
    from quant.output import last_output
    from quant.sources import open_tokenizer

    model = model or last_output()
    sampling = generation.Sampling(temperature, top_p, seed)
    tokenizer = open_tokenizer(model)
    loaded = load_model(model, device, dtype, precision=precision)
    ids = tokenizer.encode(prompt)
    stream, waiting = tokenizer.stream(ids), prompt  # which is printed if a token comes at all
    ends = {*tokenizer.eos_ids, *loaded.config.eos_token_ids}
    for token in generation.generate(loaded, ids, max_new_tokens, sampling, ends):
        print(waiting + stream.push(token), end="", flush=True)
        waiting = ""
    print(waiting + stream.flush())
