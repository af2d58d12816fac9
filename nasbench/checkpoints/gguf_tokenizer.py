"""Tokenizers from the vocabularies that GGUF files hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    import tokenizers


def gguf_tokenizer(fields: Fields) -> Tokenizer:
    """The tokenizer that a GGUF header describes. Raises UserError naming the file and the key."""
    keys = fields.under("tokenizer.ggml.")
    kind = keys.text("model", choices=("gpt2", "llama"))
    tokens = keys.items("tokens", str) or []
    kinds = keys.items("token_type", int) or [_NORMAL] * len(tokens)
    merges, scores = keys.items("merges", str) or [], keys.items("scores", float) or [0.0] * len(tokens)
    different = len(set(tokens))
    if different != len(tokens) or {len(kinds), len(scores)} != {len(tokens)}:
        numbers = f"{different} different tokens of {len(tokens)}, with {len(kinds)} types and {len(scores)} scores"
        raise UserError(f"{fields.where}: {numbers}")
    ids = {name: keys.integer(f"{name}_token_id", None, least=0) for name in ("bos", *_ENDS, *_OTHER)}
    beyond = [name for name, number in ids.items() if number is not None and number >= len(tokens)]
    if beyond:
        raise keys.wrong(f"{beyond[0]}_token_id", f"one of {len(tokens)} tokens")
    for name in ("add_eos_token", "add_sep_token", "remove_extra_whitespaces"):
        keys.neutral(name, False)
    template = fields.text("tokenizer.chat_template", None)
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
    ends = tuple(dict.fromkeys(ids[name] for name in _ENDS if ids[name] is not None))
    named = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if ids[name] is not None}
    return Tokenizer(backend, bos_id, ends, chat_template=template, special_tokens=named)


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
    "smaug-bpe": _Rules(_PATTERN.format("{1,3}")),  # SmolLM3
    "dbrx": _Rules(_PATTERN.format("{1,3}")),  # OLMo 2, Phi-4
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
