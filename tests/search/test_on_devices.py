"""What devices would choose among the same scored placements, and what another's choice costs them."""

import json
import math
from dataclasses import replace

import pytest

from nasbench.cli.main import run
from nasbench.core.errors import UserError
from nasbench.core.tables import write_table
from nasbench.cost import CostModel
from nasbench.model.shapes import MODELS
from nasbench.search.on_devices import choices
from nasbench.search.trials import Trial, TrialRow
from nasbench.store import SHARED_BLOCKS, Database, Row, block_cells

SHAPE = MODELS["smollm2-135m"]


def rows(device: str, **us: float) -> list[Row]:
    """A step of 30 layers: blocks of 10 us, and A, W and J of their own."""
    times = dict.fromkeys(SHARED_BLOCKS, 10.0) | us
    return [
        Row(
            device=device, **block_cells(SHAPE, name), dtype="bf16", context=0 if name in SHARED_BLOCKS else 8192,
            p20_us=us, p50_us=us, p80_us=us, source="measured" if device == "wide" else "estimated",
        )
        for name, us in times.items()
    ]  # fmt: skip


def trial(placement: str, score: float) -> Trial:
    about = {"device": "wide", "context": 8192, "batch": 1, "dtype": "bf16", "source": "measured", "supernet": "s"}
    speeds = {"decode_tok_s": 1.0, "prefill_tok_s": 1.0, "cache_bytes": 1, "step_ms": 1.0}
    named = " ".join(SHAPE.parse(placement))
    return Trial("beam", 1, named, **speeds, **about, objective="mix", score=score)


TRIALS = [trial("30A", 1.0), trial("15A 15W", 1.2), trial("15A 15J", 1.1), trial("30W", 2.0), trial("30J", 2.5)]
WIDE = rows("wide", A=400.0, W=100.0, J=100.0)
SLOW_J = rows("slow-j", A=400.0, W=100.0, J=600.0)


def test_devices_choose_what_is_fast_on_them():
    costs = [CostModel(some, SHAPE, "bf16") for some in (WIDE, SLOW_J)]
    found = choices(TRIALS, costs, SHAPE.placement, 8192, 1, 1.2)
    assert list(found.chosen["placement"]) == ["15A 15J", "15A 15W"]
    assert list(found.chosen["source"]) == ["measured", "estimated"]
    assert found.regret.loc["wide", "slow-j"] == pytest.approx(0.1)
    assert found.regret.loc["slow-j", "wide"] == math.inf
    assert found.regret.loc["wide", "wide"] == 0.0
    assert found.ranks.loc["wide", "slow-j"] < 0.5
    assert list(found.speeds.columns) == ["wide", "slow-j"]
    with pytest.raises(UserError, match="no trial decodes 9 times as fast as the whole model on wide"):
        choices(TRIALS, costs, SHAPE.placement, 8192, 1, 9.0)
    with pytest.raises(UserError, match="no trial has a score"):
        choices([replace(TRIALS[0], score=math.nan)], costs, SHAPE.placement, 8192, 1, 1.0)


def test_the_command(tmp_path, capsys):
    for some in (WIDE, SLOW_J):
        Database(tmp_path / "db" / f"{some[0].device}.csv").merge(some)
    write_table(tmp_path / "trials.csv", TRIALS, TrialRow)
    asked = ["db", "compare", str(tmp_path / "trials.csv"), "--devices", "wide,slow-j", "--model", "smollm2-135m"]
    asked += ["--context", "8k", "--speed-up", "1.2", "--db", str(tmp_path / "db")]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in found["chosen"]] == ["wide", "slow-j"]
    assert found["regret"]["wide"]["slow-j"] is None  # infinite
    assert run(asked) == 0
    assert "ESTIMATED" in capsys.readouterr().out
    assert run([*asked[:2], "absent.csv", *asked[3:]]) == 2
    assert "no such file" in capsys.readouterr().err
