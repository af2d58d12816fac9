"""Text for training and evaluation: splitting, tokenising once, packing into equal sequences.

Everything is a function of text, tokenizer, sequence length and seed: a run that continues sees the same batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from nasbench.checkpoints.tensors import write_tensors
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import cache_dir
from nasbench.data.text import read_documents
from nasbench.model.documents import Documents

SPLITS = ("train", "search", "test")
HELD_OUT = 0.1
"""Share of the characters that each of the two held-out splits gets."""
HELD_OUT_CHARACTERS = 8 << 20
"""More than this is not held out, however large the data."""
PIECE_CHARACTERS = 6000
"""Documents are cut at blank lines into pieces of about this size before they are split, so that few long documents
still give three splits of like content."""
_FORMAT = 1


def cut(document: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """The document in pieces of about `size` characters that end at blank lines, or at line ends where a paragraph
    is longer. Joining the pieces gives the document."""
    pieces, start = [], 0
    while len(document) - start > 1.5 * size:
        end = document.find("\n\n", start + size, start + 2 * size)
        end = end if end >= 0 else document.find("\n", start + size, start + 2 * size)
        end = end + 1 if end >= 0 else start + size
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Pieces of the documents for training, for searching and for reported numbers only, by the hash of their text."""
    pieces = [piece for document in documents for piece in cut(document) if piece.strip()]
    total = sum(map(len, pieces))
    held_out = min(HELD_OUT * total, HELD_OUT_CHARACTERS)
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    taken = 0
    for piece in sorted(pieces, key=lambda piece: (hashlib.sha256(piece.encode()).digest(), piece)):
        splits["search" if taken < held_out else "test" if taken < 2 * held_out else "train"].append(piece)
        taken += len(piece)
    return splits


def _fingerprint(documents: list[str], tokenizer: Tokenizer) -> str:
    probe = "The 3 quick foxes, 1024 of them:\n\n\tdef f(x):\n    return x['é→']  # 中文 1)"
    digest = hashlib.sha256(
        json.dumps([_FORMAT, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.encode(probe)]).encode()
    )
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]


def _tokenise(documents: list[str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """One stream of int32 token ids per split, the end-of-text token behind every piece, and as `<split>.starts` where
    pieces begin."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    streams = {}
    for name, pieces in split_documents(documents).items():
        ids: list[int] = []
        starts = []
        for first in range(0, len(pieces), 1024):
            for encoded in tokenizer.encode_batch(pieces[first : first + 1024]):
                starts.append(len(ids))
                ids += [*encoded, *end]
        streams[name] = np.asarray(ids, dtype=np.int32)
        streams[_starts(name)] = np.asarray(starts, dtype=np.int64)
    return streams


def _starts(split: str) -> str:
    return f"{split}.starts"


def _streams(documents: list[str], tokenizer: Tokenizer, fingerprint: str) -> dict[str, np.ndarray]:
    """The token streams, from the user's cache when this text was tokenised before."""
    # The fingerprint of a corpus knows the tokenizer by a probe alone: two that differ elsewhere must not share tokens.
    key = hashlib.sha256(f"{fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:32]
    path = cache_dir() / "tokens" / f"{key}.safetensors"
    if path.is_file():
        try:
            known = load_file(path)
        except (SafetensorError, OSError):
            known = {}
        if all(_starts(name) in known for name in SPLITS):
            return known
    streams = _tokenise(documents, tokenizer)
    write_tensors(path, {name: torch.from_numpy(stream) for name, stream in streams.items()})
    return streams


@dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
        tokens: [B, T] int64.
        ages: [B, T] int32, tokens of the same document before each token in its row; None where rows are read as one
            text each.
    """

    tokens: Tensor
    ages: Tensor | None = None

    @property
    def documents(self) -> Documents | None:
        """Which tokens belong together; None where rows are read as one text each."""
        return None if self.ages is None else Documents(self.ages)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def clone(self) -> Batch:
        return self._each(torch.clone)

    def copy_(self, other: Batch) -> None:
        self.tokens.copy_(other.tokens)
        if self.ages is not None and other.ages is not None:
            self.ages.copy_(other.ages)

    def rows(self, index: slice | Tensor) -> Batch:
        return self._each(lambda tensor: tensor[index])

    def split(self, rows: int) -> list[Batch]:
        """Parts of `rows` rows, the last one smaller."""
        return [self.rows(slice(first, first + rows)) for first in range(0, len(self.tokens), rows)]

    def per_row(self, values: Tensor) -> Tensor:
        """Mean of values [B, T-1], one for every token that has a next one, over each row: [B]. The last token of a
        document predicts nothing: what stands behind it is another document's."""
        if self.ages is None:
            return values.mean(1)
        counted = self.ages[:, 1:] > 0
        return values.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp_min(1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.tokens), None if self.ages is None else change(self.ages))


@dataclass(frozen=True)
class Corpus:
    """Token sequences of one length, [N, T] int64, in three splits that share no text.

    Attributes:
        search: held out; scores placements while searching.
        test: held out; only for numbers that are reported.
        fingerprint: of the text and the tokenizer.
        ages: by split, [N, T] int32, see `Batch`; empty where rows are read as one text each.
        repeat_share: of the rows of training batches, how many end with a passage of their first half.
    """

    train: Tensor
    search: Tensor
    test: Tensor
    fingerprint: str
    ages: dict[str, Tensor] = field(default_factory=dict)
    repeat_share: float = 0.0

    @classmethod
    def load(cls, data: str, tokenizer: Tokenizer, sequence: int) -> Corpus:
        """Reads, tokenises (once: kept in the user's cache) and packs. Raises UserError for bad or too little text."""
        documents = read_documents(data)
        fingerprint = _fingerprint(documents, tokenizer)
        streams = _streams(documents, tokenizer, fingerprint)
        splits = {name: pack(torch.from_numpy(streams[name]), sequence) for name in SPLITS}
        for name, packed in splits.items():
            if len(packed) == 0:
                raise UserError(
                    f"too little text in {data or 'the default corpus'}: {len(streams[name])} tokens for split {name}, "
                    f"one sequence takes {sequence}: give more text or a smaller --sequence"
                )
        ages = {name: ages_of(torch.from_numpy(streams[_starts(name)]), *splits[name].shape) for name in SPLITS}
        return cls(splits["train"], splits["search"], splits["test"], fingerprint, ages)

    def without_documents(self) -> Corpus:
        """The same rows, each read as one text whatever documents stand in it."""
        return replace(self, ages={})

    def repeating(self, share: float) -> Corpus:
        """The same text, of whose training rows a share ends with a passage that stood in them before."""
        return replace(self, repeat_share=share)

    @property
    def sequence(self) -> int:
        return self.train.shape[1]

    def held_out(self, split: str, tokens: int | None = None) -> Batch:
        """The first sequences of a split, as many as fit into `tokens` (at least one; None: all)."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        packed = Batch(getattr(self, split), self.ages.get(split))
        return packed if tokens is None else packed.rows(slice(max(1, tokens // self.sequence)))

    def batch(self, index: int, size: int, seed: int) -> Batch:
        """Training batch number `index`, of `size` rows: each epoch is one permutation of the sequences, made from the
        seed and the epoch's number, so that any batch can be had without those before it."""
        rows = range(index * size, (index + 1) * size)
        orders = {epoch: self._order(epoch, seed) for epoch in {row // len(self.train) for row in rows}}
        chosen = torch.stack([orders[row // len(self.train)][row % len(self.train)] for row in rows])
        batch = Batch(self.train, self.ages.get("train")).rows(chosen)
        if not self.repeat_share:
            return batch
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 2 + 1)
        return replace(batch, tokens=repeat_passages(batch.tokens, self.repeat_share, generator))

    def _order(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self.train), generator=generator)


def repeat_passages(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Rows [B, T] of which a share ends, for a quarter of its length, with a passage of its own first half, from a
    random place: what stood far before predicts these tokens, whatever the text is about."""
    rows, length = tokens.shape[0], tokens.shape[1] // 4
    repeats = torch.rand(rows, 1, generator=generator) < share
    starts = torch.randint(tokens.shape[1] // 2 - length + 1, (rows, 1), generator=generator)
    passages = tokens.gather(1, starts + torch.arange(length))
    kept = tokens[:, : tokens.shape[1] - length]
    return torch.cat((kept, torch.where(repeats, passages, tokens[:, kept.shape[1] :])), 1)


def pack(stream: Tensor, sequence: int) -> Tensor:
    """[n] -> [n // sequence, sequence] int64; the remainder is dropped."""
    count = len(stream) // sequence
    return stream[: count * sequence].reshape(count, sequence).long()


def ages_of(starts: Tensor, rows: int, sequence: int) -> Tensor:
    """[rows, sequence] int32: for every token of packed rows, the tokens before it in its row that are of its document.

    Args:
        starts: where documents begin in the stream that was packed, [n] int64.
    """
    begins = torch.zeros(rows * sequence, dtype=torch.bool)
    begins[starts[starts < len(begins)]] = True
    begins = begins.view(rows, sequence)
    begins[:, 0] = True
    place = torch.arange(sequence)
    return (place - torch.where(begins, place, 0).cummax(1).values).int()
