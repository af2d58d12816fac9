"""`nasbench devices`: what data sheets say, what this machine is, and what it was measured to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List known devices, the one found here, and its measured ceilings."""
    from nasbench.cli.common import mark_source, print_json, print_table
    from nasbench.cost import find_profiles, profiled_devices
    from nasbench.devices import DEVICES, detect
    from nasbench.store import CEILING, select

    here = detect("auto")
    profiled = profiled_devices(db)
    ceilings: list[dict[str, Any]] = []
    for slug in profiled:
        for row in select(find_profiles(slug, db), block=CEILING, status="ok"):
            names = ("device", "args", "dtype", "p50_us", "gb_s", "tflop_s", "source", "measured_utc")
            ceilings.append({name: getattr(row, name) for name in names})
    known = [asdict(DEVICES[slug]) | {"sources": DEVICES[slug].figure_sources} for slug in DEVICES]
    if as_json:
        mine = [row for row in ceilings if row["device"] == here.slug]
        others = [row for row in ceilings if row["device"] != here.slug]
        found = {**asdict(here), "ceilings": mine}
        print_json({"found": found, "known": known, "profiled": profiled, "other_ceilings": others})
        return
    print(f"found here: {here.slug} ({here.title}, {here.cores or '?'} cores, {here.memory_bytes / 2**30:.0f} GiB)\n")
    rows = [
        [s["slug"], s["arch"], s["memory_bytes"] // 10**9, s["bandwidth_gb_s"], s["tflop_s"], s["source"]]
        for s in known
    ]
    print_table(["known device", "arch", "GB", "GB/s", "TFLOP/s", "source"], rows, "data sheets")
    if ceilings:
        cells = [
            [row["device"], row["args"], row["dtype"], _reached(row), mark_source(row["source"])] for row in ceilings
        ]
        print_table(["device", "ceiling", "dtype", "reached", "source"], cells, "\nceilings")
    else:
        print("\nno ceilings measured yet: run `nasbench profile --model MODEL`")


def _reached(row: dict[str, Any]) -> str:
    if row["gb_s"] is not None:
        return f"{row['gb_s']:.1f} GB/s"
    return f"{row['tflop_s']:.3f} TFLOP/s" if row["tflop_s"] is not None else f"{row['p50_us']:.2f} us"
