"""A matplotlib figure as a piece of a page: SVG text without fixed size, colours by role, ids of its own, tips."""

from __future__ import annotations

import html
import io
import re

from nasbench.report.figures import Draw
from nasbench.report.style import ROLES, theme

_FONT = re.compile(r"font: (?:(?:bold|\d+) )?([\d.]+px) 'DejaVu Sans'[^;\"]*")


def inline_svg(draw: Draw, name: str, title: str, narrow: bool) -> str:
    """The figure as an `<svg>` element that fills its container.

    Args:
        name: of the figure on the page; prefix of every id.
        title: read to those who do not see it.
    """
    prefix = f"{name}-{'narrow' if narrow else 'wide'}"
    with theme(prefix):
        drawing = draw(narrow)
        buffer = io.StringIO()
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", _head(title), text, count=1, flags=re.DOTALL)
    for value, role in ROLES.items():
        text = text.replace(value, f"var({role})")
    for gid, tip in drawing.tips.items():
        label = html.escape(tip, quote=True).replace("\n", "&#10;")
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}" class="tip" data-tip="{label}">', 1)
    text = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}-", text)
    return _FONT.sub(_page_font, text)


def _head(title: str) -> str:
    return rf'<svg viewBox="\1" role="img" aria-label="{html.escape(title, quote=True)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'  # noqa: E501


def _page_font(match: re.Match[str]) -> str:
    weight = "bold " if "bold" in match[0] or "700" in match[0] else ""
    return f"font: {weight}{match[1]} var(--sans)"


def png(draw: Draw, name: str, dots_per_inch: int = 160) -> bytes:
    """The wide figure as a PNG on white."""
    with theme(name):
        buffer = io.BytesIO()
        draw(False).figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()
