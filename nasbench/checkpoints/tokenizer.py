"""Text <-> token ids through the `tokenizers` library, from a tokenizer.json or from a GGUF's vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nasbench.checkpoints.fields import Fields
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its model's special ids.

    Attributes:
        bos_id: begins every text where the model was trained so; None where it was not.
        eos_ids: any of these ends a generation; may be empty.
        embedding_rows: ids that the model has an embedding for, if known.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    embedding_rows: int | None = None

    @property
    def eos_id(self) -> int | None:
        """The first end-of-text id."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's embedding may be padded beyond."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides which ids a text has, and whether they are legal."""
        about = f"{self.backend.to_str()} {self.eos_ids} {self.embedding_rows}"
        return hashlib.sha256(about.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The text's ids, without special tokens around it; special tokens written in the text are recognised.

        Raises:
            UserError: the model has no embedding for a token of the text.
        """
        return self._known(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._known(one.ids) for one in found]

    def encode_prompt(self, text: str) -> list[int]:
        """`encode` after the token that begins every text, which is not repeated where the text itself has it."""
        ids = self.encode(text)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _known(self, ids: list[int]) -> list[int]:
        if self.embedding_rows is not None and (largest := max(ids, default=0)) >= self.embedding_rows:
            token = self.backend.id_to_token(largest)
            raise UserError(f"token {token!r} has id {largest}, beyond the model's {self.embedding_rows} embeddings")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json."""
        path.write_text(self.backend.to_str(), encoding="utf-8")


def tokenizer_from_json(path: Path, eos_ids: tuple[int, ...], embedding_rows: int | None = None) -> Tokenizer:
    """Reads a tokenizer.json. Truncation and padding stored in it are off: callers choose the lengths.

    Args:
        eos_ids: the ids that end a text.
        embedding_rows: of the model, to refuse tokens beyond them.

    Raises:
        UserError: naming the file.
    """
    import tokenizers

    if not path.is_file():
        raise UserError(f"no such file: {path} (a model folder needs the tokenizer.json of the `tokenizers` library)")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
        begin = backend.encode("", add_special_tokens=True).ids
        backend.encode(
            "a\u0001é日🙂"
        )  # A vocabulary without its own unknown token fails at the first unknown character.
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics of its own class
        raise UserError(f"{path} is not a tokenizer: {' '.join(str(error).split())}") from None
    # Configurations name a begin-of-text id even where the model was trained without one (Qwen): the tokenizer knows.
    return Tokenizer(backend, begin[0] if begin and begin[0] not in eos_ids else None, eos_ids, embedding_rows)


def gguf_tokenizer(fields: Fields) -> Tokenizer:
    """The tokenizer that a GGUF header describes. Raises UserError naming the file and the key."""
    keys = fields.under("tokenizer.ggml.")
    kind = keys.text("model", choices=("gpt2", "llama"))
    tokens = keys.items("tokens", str) or []
    kinds = keys.items("token_type", int) or [_NORMAL] * len(tokens)
    merges, scores = keys.items("merges", str) or [], keys.items("scores", float) or [0.0] * len(tokens)
    different = len(set(tokens))
    if different != len(tokens) or {len(kinds), len(scores)} != {len(tokens)}:
        raise UserError(f"{fields.where}: {different} different tokens of {len(tokens)}, with {len(kinds)} types")
    ids = {name: keys.integer(f"{name}_token_id", None, least=0) for name in ("bos", *_ENDS, *_OTHER)}
    beyond = [name for name, number in ids.items() if number is not None and number >= len(tokens)]
    if beyond:
        raise keys.wrong(f"{beyond[0]}_token_id", f"one of {len(tokens)} tokens")
    for name in ("add_eos_token", "add_sep_token", "remove_extra_whitespaces"):
        keys.neutral(name, False)
    fields.text("tokenizer.chat_template", None)
    if kind == "llama":
        keys.raw("pre")
        add_bos, space = True, keys.flag("add_space_prefix", True)
        make = lambda bos_id: sentencepiece_bpe(tokens, kinds, scores, space, bos_id)  # noqa: E731
    else:
        pre = keys.text("pre", choices=_PRE_TOKENIZERS)
        keys.neutral("add_space_prefix", False)
        add_bos = _PRE_TOKENIZERS[pre].add_bos
        make = lambda bos_id: byte_level_bpe(tokens, kinds, merges, pre, bos_id)  # noqa: E731
    # A model that was trained without a begin-of-text token must not be given one, and its file may name one still.
    bos_id = ids["bos"] if keys.flag("add_bos_token", add_bos) else None
    try:
        backend = make(bos_id)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{fields.where}: the vocabulary and its merges do not fit: {error}") from None
    return Tokenizer(backend, bos_id, tuple(dict.fromkeys(ids[name] for name in _ENDS if ids[name] is not None)))


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_ENDS = ("eos", "eot", "eom")
_OTHER = ("unknown", "padding", "seperator", "mask", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")

# The published patterns of the Llama 3 and Qwen2 tokenizers; they differ in how many digits stand together.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rules(NamedTuple):
    """How llama.cpp treats a `tokenizer.ggml.pre`."""

    pattern: str = ""  # splits the text; "" for GPT-2's own
    digits: bool = False  # single digits are split first
    whole_words: bool = False  # a piece that is a token needs no merges
    add_bos: bool = False  # a text begins with the begin-of-text token where the file does not say


_PRE_TOKENIZERS = {
    "smollm": _Rules(digits=True),
    "gpt-2": _Rules(),
    "llama-bpe": _Rules(_PATTERN.format("{1,3}"), whole_words=True, add_bos=True),
    "qwen2": _Rules(_PATTERN.format("")),
}


def byte_level_bpe(
    tokens: list[str], kinds: list[int], merges: list[str], pre_tokenizer: str, bos_id: int | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE as GGUF files of the `gpt2` tokenizer kind store it.

    Args:
        tokens: one string per id, bytes written as GPT-2 does.
        kinds: llama.cpp's token type per id.
        merges: "left right" pairs, best first.
        pre_tokenizer: the GGUF's `tokenizer.ggml.pre`. The wrong one looks right and fails around digits and newlines.
        bos_id: begins every text, if given.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    rules = _PRE_TOKENIZERS[pre_tokenizer]
    splits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    splits += [pre_tokenizers.Split(Regex(rules.pattern), "isolated")] if rules.pattern else []
    splits += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.pattern)]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=rules.whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    return _with_special_tokens(backend, tokens, kinds, bos_id)


def sentencepiece_bpe(
    tokens: list[str], kinds: list[int], scores: list[float], space_prefix: bool, bos_id: int | None = None
) -> tokenizers.Tokenizer:
    """A SentencePiece BPE as GGUF files of the `llama` tokenizer kind store it: pairs that make a token of a higher
    score are merged first, what no token covers becomes bytes. `space_prefix` puts a space before the text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    ids = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((-score, ids[left], ids[right], left, right))
    pairs.sort()
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = [(left, right) for *_, left, right in pairs]
    backend = Backend(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _with_special_tokens(backend, tokens, kinds, bos_id)


def _with_special_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int], bos_id: int | None
) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, processors

    of_kind = {kind: [token for token, k in zip(tokens, kinds, strict=True) if k == kind] for kind in set(kinds)}
    backend.add_tokens([AddedToken(token, normalized=False) for token in of_kind.get(_USER_DEFINED, [])])
    special = [*of_kind.get(_UNKNOWN, []), *of_kind.get(_CONTROL, [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos_id is not None:
        begin = tokens[bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, bos_id)]
        )
    return backend
