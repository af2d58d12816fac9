"""The report in a real browser: no error, nothing wider than the screen, figures and tips that work."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from nasbench.report import style
from nasbench.report.html import all_drawings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HEIGHT = 2400

# The page stands in a frame, because a headless window has a least width that is wider than a phone.
PROBE = """<!doctype html>
<body style="margin:0">
<iframe id="page" src="{page}" style="width:{width}px; height:{height}px; border:0; display:block"></iframe>
<script>
onload = () => {{
  const inner = document.getElementById("page").contentDocument;
  const visible = (mark) => mark.getBoundingClientRect().width > 0;
  const beyond = (mark) => !mark.closest("svg, .scroll > *") && mark.getBoundingClientRect().right > {width} + 1;
  const box = inner.getElementById("tip");
  [...inner.querySelectorAll(".tip")].find(visible).dispatchEvent(new PointerEvent("pointerenter"));
  document.body.dataset.result = JSON.stringify({{
    scroll: inner.documentElement.scrollWidth,
    client: inner.documentElement.clientWidth,
    beyond: [...inner.querySelectorAll("body *")].filter(beyond).map((mark) => mark.outerHTML.slice(0, 80)),
    figures: [...inner.querySelectorAll("figure svg")].filter(visible).length,
    tip: box.hidden ? "" : box.textContent,
    title: inner.title,
  }});
}};
</script>
"""


def browse(folder, page, width):
    """(what the probe saw, screenshot's path, console messages) of the page in a frame of this width."""
    probe, shot = folder / "probe.html", folder / "shot.png"
    probe.write_text(PROBE.format(page=page.resolve().as_uri(), width=width, height=HEIGHT))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={shot}", "--dump-dom"]
    environment = {**os.environ, "HOME": str(folder)}
    command = [CHROMIUM, *options, probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    seen = json.loads(html.unescape(re.search(r'data-result="([^"]*)"', done.stdout)[1]))
    return seen, shot, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(tmp_path, page, facts, width):
    from PIL import Image

    seen, shot, console = browse(tmp_path, page, width)
    assert console == []
    assert seen["scroll"] <= seen["client"] == width
    assert seen["beyond"] == []
    assert seen["figures"] == len(all_drawings(facts))
    assert "tokens/s" in seen["tip"]
    assert facts.shape.name in seen["title"]
    image = Image.open(shot).convert("RGB").crop((0, 0, width, HEIGHT))
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    for name in {name for point in facts.main.points for name in point.row.layers}:
        value = style.colour(name)
        assert tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) in colours, f"no {name} cell on the screen"
