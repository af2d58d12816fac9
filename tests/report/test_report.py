"""The report of a made-up run: its numbers are those of the files, it loads nothing, and a browser shows it whole."""

import html
import json
import math
import re
from pathlib import Path

import pytest
from report.synthetic_run import make_run

from nasbench.core.errors import UserError
from nasbench.report import style
from nasbench.report.facts import collect
from nasbench.report.figures import drawings, shown_points
from nasbench.report.html import all_drawings, headline, number, render, report, strip
from nasbench.runs import Run, RunSpec
from nasbench.search.trials import read_front
from nasbench.spaces.placement import parse_placement


def test_facts_are_those_of_the_files(made, facts):
    front = read_front(made[0].front)
    main = facts.main
    assert [point.row for point in main.points] == front
    assert main.points[0].delta == 0
    assert main.points[0].speedup == 1
    for point, row in zip(main.points, front, strict=True):
        assert point.delta == pytest.approx(row.loss - main.full.loss)
        assert point.speedup == pytest.approx(row.decode_tok_s / main.full.decode_tok_s)
        assert point.measured_tok_s > 0
    assert {trial.k for trial in main.even} == {1, 2, 4, 8, 15}
    assert facts.mean_error == pytest.approx(sum(abs(v.error) for v in facts.validation) / len(facts.validation))
    curves = facts.curves[facts.curves["name"] == "A"]
    assert facts.curves["name"].unique().tolist() == ["A", "W", "J", "G"]
    assert curves["context"].tolist() == [1024, 2048, 4096, 8192]
    assert (curves["batch"] == 4).all()
    assert curves["cache_bytes"].iloc[-1] * 30 == front[0].cache_bytes
    assert facts.missing == []
    assert "Q4_1 GGUF dequantised" in facts.teacher


def test_headline_is_the_fastest_within_five_percent(facts):
    found = headline(facts.main)
    assert found.near.delta <= math.log(1.05)
    assert all(p.delta > math.log(1.05) for p in facts.main.points if p.row.decode_tok_s > found.near.row.decode_tok_s)
    assert found.fastest.row.decode_tok_s == max(p.row.decode_tok_s for p in facts.main.points)


def test_page_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).lower().replace("nanometre", "")


def test_ids_are_unique_and_resolve(page):
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


def test_page_says_every_number_of_the_front(page, facts):
    text = html.unescape(page.read_text())
    for point in facts.main.points:
        assert point.row.placement in text
        assert f"{point.row.loss:,.4f}" in text
        assert f"{point.row.cache_bytes / 2**20:,.1f}" in text
    assert "made-up-cpu-2c, context 8k, batch 4, bf16" in text
    commands = html.unescape(text.partition("<pre>")[2].partition("</pre>")[0])
    assert "nasbench profile --model default --blocks 'A W J G' --contexts 8k --batches 4 --dtype bf16" in commands
    assert "nasbench distill --model default --blocks 'W J G' --out runs/run --sequence 256 --seed 0" in commands
    search = "--profile made-up-cpu-2c --context 8k --batch 4 --dtype bf16 --evaluations 80 --search-tokens 256"
    assert "nasbench search runs/run --strategy beam --objective kl --full-attention 1,2,4,8,15 " + search in commands
    assert "torch 2.13.0" in text
    assert "2026-01-02" in text


def test_pngs_lie_beside_the_page(page, facts):
    names = {path.stem for path in page.parent.glob("*.png")}
    assert set(drawings(facts)) == {
        "pareto", "layer-importance", "speed-and-cache", "predicted-against-measured",
        "training",
    }  # fmt: skip
    assert names == set(all_drawings(facts)) >= {"kl", "loss-above-teacher", "kl-against-speed-8k"}
    assert all(
        path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in page.parent.glob("*.png")
    )


def test_tips_reach_the_page(page):
    tips = re.findall(r'data-tip="([^"]+)"', page.read_text())
    assert any("tokens/s predicted, measured" in tip for tip in tips)
    assert any(tip.startswith("layer 0 replaced by W") for tip in tips)


def test_drawing_twice_gives_the_same_page(made, page):
    def body(text):
        return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "", text)

    first = body(page.read_text())
    assert body(report(*made).read_text()) == first


def test_estimated_speeds_are_marked(tmp_path):
    run, db = make_run(tmp_path, device="guess", source="estimated", extras=False)
    text = render(collect(run, db))
    assert text.count('class="estimated"') > 10
    assert "rest on estimated" in text
    assert "40 estimated rows" in text


def test_what_is_missing_is_named_with_its_command(tmp_path):
    run, db = make_run(tmp_path, extras=False)
    text = html.unescape(render(collect(run, db)))
    assert "Not measured yet" in text
    assert f"nasbench validate {run.path}" in text
    bare = Run.create(tmp_path / "bare", RunSpec("default", ("A", "J"), 30))
    text = html.unescape(render(collect(bare)))
    assert f"nasbench search {bare.path} --strategy beam" in text
    assert f"nasbench distill --model default --out {bare.path}" in text
    assert "The front" not in text


def test_every_target_has_its_section(tmp_path):
    run, db = make_run(tmp_path, targets=((1024, 1), (8192, 4)), extras=False)
    facts = collect(run, db)
    assert [(t.target.context, t.target.batch) for t in facts.targets] == [(8192, 4), (1024, 1)]
    assert "context 1k, batch 1" in render(facts)
    assert "pareto-2" in drawings(facts)


def test_bad_files_are_named(tmp_path):
    run, db = make_run(tmp_path)
    lines = run.validation.read_text().splitlines()
    run.validation.write_text("\n".join([*lines[:2], lines[2].replace("8192", "8k"), *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=r"validation\.csv line 3 column context: bad value '8k'"):
        report(run, db)
    assert not run.report.exists()


def test_every_registered_kind_has_its_own_colour():
    from nasbench.model import MIXERS

    colours = [style.colour(kind) for kind in MIXERS]
    assert len(set(colours)) == min(len(colours), len(style.PALETTE))
    assert all(style.colour(kind) != style.colour("X") for kind in MIXERS)
    assert style.colour("W1152") == style.colour("W")


def test_strip_and_numbers():
    cells = str(strip(parse_placement("2A W J")))
    assert cells.count('class="k-A"') == 2
    assert 'aria-label="2A W J"' in cells
    assert number(-0.5, "+.2f") == "−0.50"
    assert number(math.nan) == "–"


def test_only_so_many_points_get_a_strip(facts):
    shown = shown_points(facts.main.points, 8)
    assert shown[0] is facts.main.points[0]
    assert shown[-1] is facts.main.points[-1]
    assert len(shown) <= 8


def test_command(made, capsys):
    from nasbench.cli.main import run

    assert run(["report", str(made[0].path), "--db", str(made[1])]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == made[0].report / "index.html"
    assert run(["report", str(made[0].path), "--db", str(made[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(path)
    assert run(["report", str(made[0].path), "--db", "/nonexistent"]) == 2
    assert run(["report", str(made[1])]) == 2
    assert "is not a run folder" in capsys.readouterr().err
