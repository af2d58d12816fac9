"""Text <-> token ids through the `tokenizers` library, as transformers reads a model folder."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.fields import Fields, read_object, refuse_pointer
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
        chat_template: Jinja text that writes a conversation as the model was trained on; None where there is none.
        special_tokens: texts of named tokens (`bos_token`, ...), for the template.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    embedding_rows: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)

    @property
    def eos_id(self) -> int | None:
        """The first end-of-text id."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def prefix_id(self) -> int:
        """Stands before a text that has nothing before it, as in lm-evaluation-harness: the begin-of-text token, also
        where texts do not begin with it, else that of the end."""
        named = [self.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        found = [
            self.bos_id,
            *(None if text is None else self.backend.token_to_id(text) for text in named),
            self.eos_id,
        ]
        rows = self.embedding_rows or self.vocab_size
        return next((index for index in found if index is not None and index < rows), 0)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's embedding may be padded beyond."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides which ids a text has, and whether they are legal."""
        # The library does not write down whether special tokens in a text are recognised.
        about = f"{self.backend.to_str()} {self.backend.encode_special_tokens} {self.eos_ids} {self.embedding_rows}"
        return hashlib.sha256(about.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The text's ids, without special tokens around it; special tokens written in the text are recognised.

        Raises:
            UserError: the model has no embedding for a token of the text.
        """
        with library_errors("the tokenizer cannot encode a text"):
            found = self.backend.encode(text, add_special_tokens=False)
        return self._known(found.ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        with library_errors("the tokenizer cannot encode a text"):
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
        with library_errors("the tokenizer cannot decode"):
            return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json."""
        path.write_text(self.backend.to_str(), encoding="utf-8")


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns an error of the `tokenizers` library into a UserError of one line that begins with `what`: it raises bare
    Exceptions, and panics of a class that is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what native code writes to standard error: a panic tells its story there before it is raised."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without standard error
        yield
        return
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def tokenizer_from_json(path: Path, eos_ids: tuple[int, ...], embedding_rows: int | None = None) -> Tokenizer:
    """Reads a tokenizer.json, and the tokenizer_config.json and chat_template.jinja beside it where they are.

    Truncation and padding stored in it are off: callers choose the lengths.

    Args:
        eos_ids: the ids that end a text.
        embedding_rows: of the model, to refuse tokens beyond them.

    Raises:
        UserError: naming the file.
    """
    import tokenizers

    if not path.is_file():
        raise UserError(f"no such file: {path} (a model folder needs the tokenizer.json of the `tokenizers` library)")
    refuse_pointer(path)
    with library_errors(f"{path} is not a tokenizer"), _quiet():
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        backend.no_truncation()
        backend.no_padding()
        # A vocabulary without its own unknown token fails at the first unknown character.
        backend.encode("a\u0001é日🙂")
    file = path.with_name("tokenizer_config.json")
    fields = Fields(read_object(file) if file.is_file() else {}, str(file))
    if embedding_rows is not None:  # a model never writes a token beyond its embedding, and must not be given one
        eos_ids = tuple(index for index in eos_ids if index < embedding_rows)
    with library_errors(f"{file} does not fit {path.name}"), _quiet():
        named = _add_special_tokens(backend, fields)
        bos_id = _begin(backend, eos_ids)
    found = Tokenizer(backend, bos_id, eos_ids, embedding_rows, _chat_template(path.parent, fields), named)
    found._known([] if bos_id is None else [bos_id])
    return found


_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _add_special_tokens(backend: tokenizers.Tokenizer, fields: Fields) -> dict[str, str]:
    """Adds the special tokens that only tokenizer_config.json has, as transformers does; texts of the named ones."""
    from tokenizers import AddedToken

    def content(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    listed = {name: fields.raw(name) for name in _NAMED}
    named = {name: str(content(token)) for name, token in listed.items() if token is not None}
    more = [fields.raw(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    others = [token for tokens in more for token in (tokens.values() if isinstance(tokens, dict) else tokens or [])]
    declared = fields.object("added_tokens_decoder").data
    by_id = [declared[number] for number in sorted(declared, key=int)]
    added = backend.get_added_tokens_decoder().values()
    known, special = {token.content for token in added}, {token.content for token in added if token.special}
    for token in [*by_id, *listed.values(), *others]:
        text = content(token)
        if token is None or text in (known if any(token is one for one in by_id) else special):
            continue
        if not isinstance(text, str):
            raise UserError(f"{text!r} is no text of a token")
        flags = {key: token[key] for key in _FLAGS if key in token} if isinstance(token, dict) else {}
        if flags.pop("special", True) or text in named.values():
            backend.add_special_tokens([AddedToken(text, special=True, **flags)])
            special.add(text)
        else:
            backend.add_tokens([AddedToken(text, special=False, **flags)])
        known.add(text)
    backend.encode_special_tokens = fields.flag("split_special_tokens")
    return named


_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def _begin(backend: tokenizers.Tokenizer, eos_ids: tuple[int, ...]) -> int | None:
    """The token that begins every text. tokenizer.json alone decides: configurations name one even where the model was
    trained without it (Qwen), and transformers ignores `add_bos_token` beside a tokenizer.json."""
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if whole[: len(plain)] == plain and (plain or not whole or whole[0] in eos_ids):
        return None
    if len(plain) and whole[1 : 1 + len(plain)] != plain:
        raise UserError("more than one token begins every text, which is not supported")
    return whole[0]


def _chat_template(folder: Path, fields: Fields) -> str | None:
    """The template of chat_template.jinja, else of tokenizer_config.json: of several, the one named `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text") from None
    found = fields.raw("chat_template")
    if isinstance(found, list):
        several = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = several.get("default")
    if found is not None and not isinstance(found, str):
        raise fields.wrong("chat_template", "a text")
    return found
