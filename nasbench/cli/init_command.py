"""`nasbench init`: a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.cli.common import AsJson
from nasbench.core.errors import UserError

RECIPE = '''# A recipe of nasbench: settings, and the stages that use them. Run it with
#
#     nasbench run {path} --dry-run      # prints the commands, with time and memory
#     nasbench run {path}                # runs them; stopped at any moment, it continues
#     nasbench run {path} --set scale=0.1    # a tenth of every budget
#
# `nasbench COMMAND --help` explains every option, docs/guide.md every letter.
title = "{title}"

# Words for the commands below: {{NAME}} becomes the setting. `--set NAME=VALUE` changes one for a run.
[settings]
model = {model}                # `default`, a Hugging Face folder, a GGUF file or a hub name
blocks = {blocks}              # layer kinds beside full attention, as in placements
data = ""                      # text to train on: a .txt, .jsonl, .parquet or a folder; "": Python's help
sequence = "512"               # tokens of a training row: at least twice the widest window
full_attention = "1,2,4,8"     # numbers of layers that keep full attention
context = "4k"                 # be fast at this context ...
batch = "4"                    # ... with so many sequences

# What counts on one kind of device only.
[settings.cuda]
sequence = "2k"
batch = "32"

# What `--set scale=X` multiplies.
[budget]
align_tokens = "64k"           # block-wise alignment of every alternative to the attention
supernet_tokens = "32k"        # random sub-networks against the model
evaluations = 80               # placements that the search looks at
finalize_tokens = "128k"       # distillation of the chosen placement

# Settings of the training, written to OUT/training.toml: see nasbench/supernet/settings.py.
[training]
whole = true                   # finalising trains whole layers, not only the replaced mixers

[[stage]]
title = "profile: every layer kind on this device"
command = """profile --model {{model}} --blocks "{{blocks}}" --contexts {{context}} --batches {{batch}} --calibrate
  --device {{device}} --dtype {{dtype}} --db {{db}}"""

[[stage]]
title = "distill: the alternatives of every layer"
command = """distill --model {{model}} --blocks "{{blocks}}" --out {{out}} --data "{{data}}" --sequence {{sequence}}
  --config {{training}} --align-tokens {{align_tokens}} --supernet-tokens {{supernet_tokens}} --device {{device}}
  --dtype {{dtype}}"""
makes = "{{out}}/supernet"

[[stage]]
title = "search: beam over the full-attention layers"
command = """search {{out}} --strategy beam --full-attention {{full_attention}} --context {{context}} --batch {{batch}}
  --evaluations {{evaluations}} --dtype {{dtype}} --db {{db}} --device {{device}} --eval-dtype {{dtype}}"""
makes = "{{out}}/front.csv"

# One stage for each part of the setting that `each` names.
[[stage]]
title = "finalize: K = {{each}}"
each = "full_attention"
command = """finalize {{out}} --full-attention {{each}} --tokens {{finalize_tokens}} --config {{training}}
  --device {{device}} --dtype {{dtype}}"""

[[stage]]
title = "validate: the front end to end on this device"
command = "validate {{out}} --context {{context}} --batch {{batch}} --dtype {{dtype}} --db {{db}} --device {{device}}"
makes = "{{out}}/validation.csv"

[[stage]]
title = "report: one HTML file"
command = "report {{out}} --db {{db}}"
makes = "{{out}}/report/index.html"
'''


def command(
    path: Annotated[Path, typer.Argument(help="The new file, as mine.toml.")],
    model: Annotated[str, typer.Option(help="Of the recipe; see nasbench models.")] = "default",
    blocks: Annotated[str, typer.Option(help="Layer kinds beside full attention, as 'W256 J'.")] = "W256 J",
    as_json: AsJson = False,
) -> None:
    """Write a commented recipe for `nasbench run`: profile, distil, search, finalize, validate, report."""
    import json

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, parse_kinds, print_json
    from nasbench.core.files import write_text

    if path.suffix != ".toml":
        raise UserError(f"bad name {path}: a recipe is a .toml")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, nothing is overwritten")
    parse_kinds(blocks, resolve_shape(model))
    # JSON's texts are TOML's, too.
    values = {"model": json.dumps(model), "blocks": json.dumps(blocks)}
    write_text(path, RECIPE.format(path=path, title=f"Hybrids of {model}".replace('"', "'"), **values))
    log(f"next: nasbench run {path} --dry-run")
    if as_json:
        print_json({"recipe": str(path)})
    else:
        print(path)
