"""Conversations as text, by the Jinja template of a model. It runs in a sandbox: a template is foreign code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.parser import Parser


def chat_text(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation up to where the model's answer begins. Its special tokens are written out: encode it
    without a further begin-of-text token.

    Args:
        messages: `role` and `content` of each.

    Raises:
        UserError: the model has no template, or its template refuses the messages or is broken.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tokenizer.chat_template is None:
        raise UserError("this model has no chat template: leave --chat out, or use an instruct model")
    # The settings and functions that transformers gives to templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _answers()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(tokenizer.chat_template)
        return template.render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **tokenizer.special_tokens
        )
    except Exception as error:  # whatever the template does
        raise UserError(f"the chat template of this model fails: {' '.join(str(error).split())}") from None


def _answers() -> type[Extension]:
    """The block `generation`, which marks answers for training: here no more than its content."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Answers(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Answers


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
