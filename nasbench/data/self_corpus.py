"""Data-free mode: the teacher writes its own corpus, sampled at temperature 1.

Where a model's training text is not available, its own samples are the nearest thing (LLM-QAT, arXiv 2305.17888): they
come from the very distribution that the student is to keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nasbench.checkpoints.load import LoadedModel
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors, sole, write_text
from nasbench.runtime.generate import generate

BATCH = ByDevice(cpu=8, cuda=512)
"""Documents written at once."""
SHORTEST = 16
"""Documents of fewer tokens are left out."""


@dataclass(frozen=True)
class Writing:
    """What is written.

    Attributes:
        model: as given to --model.
        length: most tokens of a document.
        batch: documents at once.
        temperature, top_p: of the sampling.
    """

    model: str
    length: int = 512
    batch: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Tokens that are no text: any of them ends a document."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {*tokenizer.eos_ids, *(number for number, token in added.items() if token.special)}


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What documents may begin with: the begin-of-text token where texts have one, else pieces of text that begin with
    a capital letter, else any text."""
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    ordinary = sorted(set(range(tokenizer.vocab_size)) - special_ids(tokenizer))
    texts = {number: tokenizer.decode([number]) for number in ordinary}
    capital = [number for number, text in texts.items() if len(text) > 1 and text.isalpha() and text[0].isupper()]
    return capital if len(capital) >= 16 else ordinary


def write_batch(loaded: LoadedModel, writing: Writing, number: int, firsts: list[int]) -> list[list[int]]:
    """The documents of batch `number`, a function of the seed and the number."""
    seed = writing.seed * 1_000_003 + number
    generator = torch.Generator().manual_seed(seed)
    chosen = [firsts[i] for i in torch.randint(len(firsts), (writing.batch,), generator=generator).tolist()]
    ends = special_ids(loaded.tokenizer)
    rows = generate(
        loaded.decoder,
        [[first] for first in chosen],
        max_new_tokens=writing.length - 1,
        eos_ids=ends,
        temperature=writing.temperature,
        top_p=writing.top_p,
        seed=seed,
    )
    # A begin-of-text token is no text.
    return [[first, *row] if first not in ends else row for first, row in zip(chosen, rows, strict=True)]


def write_corpus(
    loaded: LoadedModel,
    writing: Writing,
    tokens: int,
    path: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> int:
    """Writes documents of at least `tokens` tokens in all to a .jsonl, and returns how many tokens they are.

    Batches that are done lie in a hidden file beside it: the same call continues after a stop, and gives the same file.
    Raises UserError for bad settings, MachineError when the disk refuses.
    """
    longest = loaded.shape.max_context
    if not SHORTEST <= writing.length <= longest:
        raise UserError(f"bad length {writing.length}: choose {SHORTEST} to {longest}, the context of the model")
    partial = path.with_name(f".{path.name}.partial")
    firsts, source = first_tokens(loaded.tokenizer), f"{writing.model}, temperature {writing.temperature:g}"
    documents = _read_partial(partial, writing)
    total = sum(document["tokens"] for document in documents)
    number = documents[-1]["batch"] + 1 if documents else 0
    write_text(partial, _lines([asdict(writing), *documents]))
    with machine_errors(f"writing {partial}"), partial.open("a", encoding="utf-8") as file:
        while total < tokens:
            new: list[dict[str, Any]] = []
            for ids in write_batch(loaded, writing, number, firsts):
                text = loaded.tokenizer.decode(ids)
                if len(ids) >= SHORTEST and text.strip():
                    new.append({"text": text, "source": source, "tokens": len(ids), "batch": number})
            if not new and number > len(documents) + 8:
                raise UserError(f"{writing.model} writes nothing of {SHORTEST} tokens: choose another model")
            file.write(_lines(new))
            file.flush()
            documents += new
            total += sum(document["tokens"] for document in new)
            number += 1
            progress("corpus", min(total, tokens), tokens)
    write_text(path, _lines(documents))
    partial.unlink(missing_ok=True)
    return total


def writing_alone(path: Path) -> AbstractContextManager[None]:
    """Lets one process at a time write a corpus. Raises UserError at once where another one does."""
    return sole(path.with_name(f".{path.name}.lock"), f"another process writes {path}: choose another --out")


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_partial(path: Path, writing: Writing) -> list[dict[str, Any]]:
    """The documents of the whole batches of a stopped call with the same settings. The last batch may be torn: it is
    written again."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    if not rows or rows[0] != asdict(writing):
        return []
    documents = rows[1:]
    kinds = {"batch": int, "tokens": int, "text": str, "source": str}
    if not all(isinstance(row, dict) and all(isinstance(row.get(n), k) for n, k in kinds.items()) for row in documents):
        return []
    return [row for row in documents if row["batch"] < documents[-1]["batch"]]
