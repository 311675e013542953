"""`halfbit eval` and `halfbit generate`: a model, compressed or not, at work."""

import json
import math
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import TextStreamer

from halfbit.commands import MOST, AsJson, Device, Verified, device_of, out, told
from halfbit.errors import (
    CalibrationError,
    Unsupported,
)
from halfbit.evaluate import evaluate, load
from halfbit.samples import load_tokenizer


@told
def evaluate_command(
    folder: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    text: Annotated[str, typer.Option(help="Text file, .jsonl with 'text', or data set name.")],
    against: Annotated[str | None, typer.Option(help="The original: adds KL divergence and top-1 agreement.")] = None,
    sequence_length: Annotated[
        int, typer.Option(min=0, help="Tokens per window. [the model's, at most 2048]", show_default=False)
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Use only so many tokens of the text. [all]", show_default=False)
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Of the span corruption (encoder-decoder models).")] = 0,
    corruption: Annotated[
        str, typer.Option(help="Of encoder-decoder models: t5 (random spans) or fixed (3 tokens).")
    ] = "t5",
    device: Device = "auto",
    verify: Verified = True,
    as_json: AsJson = False,
) -> None:
    """Perplexity and loss on a text; encoder-decoder models: loss by span corruption.

    The text is tokenized as a whole without special tokens and cut into windows that do not overlap; the loss is the
    mean cross-entropy over positions 2 to the end of each window.
    """
    result = evaluate(
        folder,
        text,
        against=against,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        seed=seed,
        corruption=corruption,
        device=device_of(device),
        verify=verify,
    ).as_dict()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("figure", "value", title=str(folder))
    for key, value in result.items():
        table.add_row(key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    out.print(table)


@told
def generate(
    folder: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    device: Device = "auto",
    verify: Verified = True,
) -> None:
    """Continue a prompt; tokens appear as they are made."""
    where = device_of(device)
    if not math.isfinite(temperature):
        raise Unsupported(f"--temperature: expected a finite number, got {temperature}")
    model, tokenizer = load(folder, device=where, verify=verify), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(where)
    if inputs["input_ids"].numel() == 0:
        raise CalibrationError("--prompt: gives no tokens; write at least a word to continue")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
    model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)
