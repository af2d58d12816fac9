"""The report in a real browser: no error, nothing wider than the screen; figures, tips and the budget work."""

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from nasbench.report import style
from nasbench.report.compare import RunsPage

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
  const mark = [...inner.querySelectorAll(".tip")].find(visible);
  mark.focus();
  const told = box.hidden ? "" : box.textContent, cells = box.querySelectorAll(".strip i").length;
  mark.dispatchEvent(new KeyboardEvent("keydown", {{ key: "ArrowRight", bubbles: true }}));
  const next = box.textContent;
  const slider = inner.getElementById("budget"), ranks = [];
  let ring = [];
  for (const value of slider ? [slider.value, slider.max] : []) {{
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    const choice = [...inner.querySelectorAll(".choice")].filter((each) => !each.hidden);
    ranks.push(choice.length === 1 ? Number(choice[0].dataset.rank) : null);
    ring = ["ring", `point-${{ranks.at(-1)}}`].map(
      (name) => inner.querySelector(`#pareto-{shape}-${{name}} use`).getAttribute("x"));
  }}
  document.body.dataset.result = JSON.stringify({{
    scroll: inner.documentElement.scrollWidth,
    client: inner.documentElement.clientWidth,
    beyond: [...inner.querySelectorAll("body *")].filter(beyond).map((mark) => mark.outerHTML.slice(0, 80)),
    figures: [...inner.querySelectorAll("figure svg")].filter(visible).length,
    loads: performance.getEntriesByType("resource").map((each) => each.name).filter((name) => name !== "{page}"),
    unnamed: [...inner.querySelectorAll("svg, input, button, .tip")].filter(
      (mark) => !(mark.getAttribute("aria-label") || mark.textContent || mark.labels?.length)).length,
    paper: getComputedStyle(inner.body).backgroundColor,
    tip: told, cells, next, ranks, ring, title: inner.title,
  }});
}};
</script>
"""


def browse(folder, page, width, *more):
    """(what the probe saw, screenshot's path, console messages) of the page in a frame of this width."""
    probe, shot = folder / "probe.html", folder / "shot.png"
    shape = "narrow" if width < 736 else "wide"
    probe.write_text(PROBE.format(page=page.resolve().as_uri(), width=width, height=HEIGHT, shape=shape))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [*more, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={shot}", "--dump-dom"]
    environment = {**os.environ, "HOME": str(folder)}
    command = [CHROMIUM, *options, probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    seen = json.loads(html.unescape(re.search(r'data-result="([^"]*)"', done.stdout)[1]))
    return seen, shot, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium")
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.mark.parametrize(("width", "more"), [(390, (DARK,)), (1280, ())], ids=["dark phone", "light desktop"])
def test_in_a_browser(tmp_path, page, whole, facts, width, more):
    from PIL import Image

    seen, shot, console = browse(tmp_path, page, width, *more)
    assert console == []
    assert seen["loads"] == []
    assert seen["scroll"] <= seen["client"] == width
    assert seen["beyond"] == []
    assert seen["figures"] == len(whole.figures)
    assert seen["unnamed"] == 0
    assert "tokens/s" in seen["tip"]
    assert seen["next"] != seen["tip"]
    assert seen["ranks"] == [whole.verdicts[index].point.row.rank for index in (whole.best, -1)]
    assert seen["ring"][0] == seen["ring"][1]
    assert facts.shape.name in seen["title"]
    dark = sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) < 384
    assert dark == bool(more)
    image = Image.open(shot).convert("RGB").crop((0, 0, width, HEIGHT))
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    for name in {name for point in facts.main.points for name in point.row.layers}:
        value = style.colour(name)
        assert tuple(int(value[i : i + 2], 16) for i in (1, 3, 5)) in colours, f"no {name} cell on the screen"


def test_runs_compared_in_a_browser(tmp_path, facts):
    page = RunsPage.of([facts, facts])
    path = page.write(tmp_path / "both")
    text = path.read_text()
    assert text.count(page.told[0].sentences[0]) == 2
    assert {row[0].text for row in page.tables[0].rows} == {str(facts.run.path)}
    assert (path.parent / "tables" / "by-count.md").is_file()
    assert (path.parent / "figures" / "fronts.svg").is_file()
    seen, _, console = browse(tmp_path, path, 390)
    assert console == []
    assert seen["scroll"] <= seen["client"] == 390
    assert seen["beyond"] == []
    assert "K = " in seen["tip"]


def test_it_prints(tmp_path, page):
    pdf = tmp_path / "page.pdf"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [CHROMIUM, *options, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", page.resolve().as_uri()]
    subprocess.run(command, check=True, timeout=120, env=environment, capture_output=True)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert pdf.read_bytes().count(b"/Type /Page\n") >= 3
