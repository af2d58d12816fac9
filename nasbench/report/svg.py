"""A matplotlib figure as a piece of a page: SVG text without fixed size, colours by role, ids of its own, tips."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass

from nasbench.report.drawing import Draw, Drawing
from nasbench.report.style import ROLES, theme

_FONT = re.compile(r"font: (?:(?:bold|\d+) )?([\d.]+px) 'DejaVu Sans'[^;\"]*")
DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Rendered:
    """A figure in every form: two inline SVGs for the page, of which it shows the one that fits, and two files."""

    title: str
    inline: str
    svg: str
    png: bytes


def rendered(draw: Draw, name: str, title: str) -> Rendered:
    """Draws a figure wide and narrow.

    Args:
        name: of the figure on the page; prefix of every id.
        title: read to those who do not see it.
    """
    inline = ""
    svg, png = "", b""
    for width in ("wide", "narrow"):
        prefix = f"{name}-{width}"
        with theme(prefix):
            drawing = draw(width == "narrow")
            text = _svg(drawing)
            if width == "wide":
                svg, buffer = text, io.BytesIO()
                drawing.figure.set_layout_engine("none")
                drawing.figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
                png = buffer.getvalue()
        inline += f'<div class="{width}">{_inlined(text, drawing, prefix, title)}</div>'
    return Rendered(title, inline, svg, png)


def _svg(drawing: Drawing) -> str:
    buffer = io.StringIO()
    drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)


def _inlined(text: str, drawing: Drawing, prefix: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", _head(title), text, count=1, flags=re.DOTALL)
    for value, role in ROLES.items():
        text = text.replace(value, f"var({role})")

    def tip(match: re.Match[str]) -> str:
        gid = match[1]
        if gid not in drawing.tips:
            return match[0]
        label = html.escape(drawing.tips[gid], quote=True).replace("\n", "&#10;")
        placement = html.escape(drawing.placements.get(gid, ""), quote=True)
        strip = f' data-placement="{placement}"' if placement else ""
        return f'<g id="{gid}" class="tip" role="img" aria-label="{label}"{strip}>'

    text = re.sub(r'<g id="([^"]+)">', tip, text)
    text = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}-", text)
    return _FONT.sub(_page_font, text)


def _head(title: str) -> str:
    label = html.escape(title, quote=True)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return rf'<svg viewBox="\1" role="group" aria-label="{label}" {names}>'


def _page_font(match: re.Match[str]) -> str:
    weight = "bold " if "bold" in match[0] or "700" in match[0] else ""
    return f"font: {weight}{match[1]} var(--sans)"
