"""How far our logits are from transformers', per model of `TINY`. As a script, it writes docs/families.md.

python tests/checkpoints/families_table.py
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from tiny_models import SIZES, TINY, save_tiny
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints.load import load_model

LENGTH, FIRST = 100, 37
"""Tokens of a text, beyond the windows and scaled contexts of TINY; those that a cached pass reads at once."""


def cached_logits(reference, ids):
    """transformers reads the first tokens and then one at a time. A short text undoes what an earlier one has left."""
    reference(ids[:, :3])
    first = reference(ids[:, :FIRST], use_cache=True)
    parts = [first.logits]
    for i in range(FIRST, ids.shape[1]):
        parts.append(reference(ids[:, i : i + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    return torch.cat(parts, 1)


@torch.inference_mode()
def differences(folder, reference):
    """{"whole": .., "cached": ..}: relative RMSE of fp32 logits of two texts of LENGTH tokens."""
    decoder = load_model(str(folder)).decoder
    ids = torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = decoder.new_cache(2, LENGTH)
    parts = [decoder(ids[:, :FIRST], cache)]
    steps = [decoder.step(ids[:, i], cache)[:, None] for i in range(FIRST, LENGTH)]
    # Frequencies that vary with the length make a cached pass another one: its keys have older rotations.
    expected = reference(ids).logits
    cached = cached_logits(reference, ids) if decoder.shape.layer().rotary.varies else expected
    return {
        "whole": relative_rmse(decoder(ids), expected),
        "cached": relative_rmse(torch.cat([*parts, *steps], 1), cached),
    }


PAGE = """# Families against transformers

nasbench computes the same logits as transformers {version}. The table has the relative RMSE of fp32 logits on a CPU,
for tiny random models and two texts of {length} tokens. These texts exceed the windows and the original contexts.
"Cached" reads {first} tokens at once and then one at a time.

| model | class | configuration beyond the common one | whole | cached |
|---|---|---|---|---|
{rows}

Limit: {limit:.0e}. Common configuration: {sizes}.

`python tests/checkpoints/families_table.py` writes this page. `tests/checkpoints/test_decoder.py` holds the limit.

| family | largest difference |
|---|---|
{largest}

jet_nemotron is no class of transformers. Its two attention kinds are Qwen2's; JetBlock is compared with the authors'
formulas in `tests/model`.
"""


def main():
    import transformers

    rows, largest = [], {}
    for name, (family, extra) in TINY.items():
        with tempfile.TemporaryDirectory() as folder:
            found = differences(Path(folder), save_tiny(name, Path(folder)))
        about = (
            ", ".join(f"{key} {value}" for key, value in extra.items() if key != "pad_token_id")
            .replace("|", "/")
            .replace("'", "")
        )
        rows.append(f"| `{name}` | {family} | {about} | {found['whole']:.1e} | {found['cached']:.1e} |")
        largest[family] = max(largest.get(family, 0.0), *found.values())
    page = PAGE.format(
        version=transformers.__version__, length=LENGTH, first=FIRST, rows="\n".join(rows), limit=LOGITS_FP32,
        sizes=", ".join(f"{key} {value}" for key, value in SIZES.items()),
        largest="\n".join(f"| {family} | {error:.1e} |" for family, error in largest.items()),
    )  # fmt: skip
    (Path(__file__).parents[2] / "docs" / "families.md").write_text(page)


if __name__ == "__main__":
    main()
