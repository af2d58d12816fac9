"""Profile rows of the tiny model that nobody measured."""

from supernet_tiny import SHAPE

from nasbench.store import SHARED_BLOCKS, Row, block_cells

US = {"A": 100.0, "W": 30.0, "J": 20.0, "norm": 1.0, "mlp": 10.0, "embedding": 1.0, "head": 5.0}


def profile_rows(source="measured", device="test-device"):
    """Decode rows of every block of the tiny model at contexts 64 and 256, batch 1 and 4, growing with both."""
    rows = []
    for name, us in US.items():
        shared = name in SHARED_BLOCKS
        config = None if shared else SHAPE.mixer({"W": "W8"}.get(name, name))
        cells = block_cells(SHAPE, name) if config is None else block_cells(SHAPE, config.kind, config.args)
        for batch in (1, 4):
            for context in (0,) if shared else (64, 256):
                time = us * (1 + batch / 4) * (1 + (context / 64 if name == "A" else 0))
                times = {"p20_us": time, "p50_us": time, "p80_us": time}
                rows.append(
                    Row(device=device, **cells, batch=batch, context=context, dtype="bf16", source=source, **times)
                )
    return rows
