"""nasbench generate: text from a checkpoint, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nasbench.cli.common import AsJson, Device, Dtype
from nasbench.core.errors import UserError


def command(
    checkpoint: Annotated[str, typer.Argument(help="A model folder, .gguf file, hub name or default.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask as in a chat, by the model's own template.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Continue a text; the continuation goes to standard output."""
    from nasbench.checkpoints.chat import chat_text
    from nasbench.checkpoints.load import load_model
    from nasbench.cli.common import choose_dtype, print_json, torch_device, torch_dtype

    stop = stop or []
    if "" in stop:
        raise UserError("empty --stop: write the text to stop at")
    where = torch_device(device)
    loaded = load_model(checkpoint, dtype=torch_dtype(choose_dtype(dtype, where)), device=where)
    tokenizer = loaded.tokenizer

    import torch

    from nasbench.runtime.generate import stream, until_stop

    if chat:
        ids = tokenizer.encode(chat_text(tokenizer, [{"role": "user", "content": prompt}]))
    else:
        ids = tokenizer.encode_prompt(prompt)
    if not ids:
        raise UserError("empty prompt: write some text to continue")
    new: list[int] = []
    write = (lambda part: None) if as_json else sys.stdout.write
    text, certain, shown, stopped = "", "", 0, False
    for token in stream(
        loaded.decoder,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        if int(token) in tokenizer.eos_ids:
            break
        new.append(int(token))
        text = tokenizer.decode(new)
        # A character of several tokens decodes to the replacement sign until its last one is there.
        certain, stopped = until_stop(text.rstrip("\ufffd"), stop)
        write(certain[shown:])
        sys.stdout.flush()
        shown = max(shown, len(certain))
        if stopped:
            break
    write(("" if stopped else text[shown:]) + "\n")
    if as_json:
        print_json({"prompt": prompt, "text": certain if stopped else text, "tokens": len(new), "stopped": stopped})
