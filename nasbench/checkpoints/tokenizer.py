"""Text <-> token ids through the `tokenizers` library, from a tokenizer.json or from a GGUF's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.core.errors import UserError, unknown

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its model's special ids.

    Attributes:
        bos_id: begins every text where the model was trained so; None where it was not.
        eos_ids: any of these ends a generation; may be empty.
        vocab_size: ids that the tokenizer knows (a model's embedding may be padded beyond).
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def eos_id(self) -> int | None:
        """The first end-of-text id."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """The text's ids, without special tokens around it; special tokens written in the text are recognised."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [list(found.ids) for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json."""
        path.write_text(self.backend.to_str(), encoding="utf-8")


def tokenizer_from_json(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Reads a tokenizer.json; end-of-text ids are config.json's. Raises UserError naming the file."""
    import tokenizers

    if not path.is_file():
        raise UserError(f"no such file: {path} (a model folder needs the tokenizer.json of the `tokenizers` library)")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from None
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    # Configurations name a begin-of-text id even where the model was trained without one (Qwen): the tokenizer knows.
    begin = backend.encode("", add_special_tokens=True).ids
    return Tokenizer(backend, begin[0] if begin and begin[0] not in eos_ids else None, eos_ids)


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def byte_level_bpe(
    tokens: list[str], kinds: list[int], merges: list[str], pre_tokenizer: str, bos_id: int | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE as GGUF files of the `gpt2` tokenizer kind store it.

    Args:
        tokens: one string per id, bytes written as GPT-2 does.
        kinds: llama.cpp's token type per id; control tokens become special, user-defined ones are added as they are.
        merges: "left right" pairs, best first.
        pre_tokenizer: the GGUF's `tokenizer.ggml.pre`. What splits the text before the merges decides the ids: taking
            the wrong one gives a tokenizer that looks right and is wrong around digits and newlines.
        bos_id: begins every text, if given.

    Raises:
        UserError: for a pre-tokenizer that is not known here.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The published patterns of the Llama 3 and Qwen2 tokenizers; they differ in how many digits stand together.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    table: dict[str, Callable[[], list[Any]]] = {
        "smollm": lambda: [digits, byte_level],
        "gpt-2": lambda: [byte_level],
        "llama-bpe": lambda: [pre_tokenizers.Split(Regex(pattern.format("{1,3}")), "isolated"), plain_bytes],
        "qwen2": lambda: [pre_tokenizers.Split(Regex(pattern.format("")), "isolated"), plain_bytes],
    }
    if pre_tokenizer not in table:
        raise unknown("GGUF pre-tokenizer", pre_tokenizer, table)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(table[pre_tokenizer]())
    backend.decoder = decoders.ByteLevel()
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
