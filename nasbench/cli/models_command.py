"""nasbench models: the shapes that --model knows by name."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """List the built-in model shapes and the default model."""
    from nasbench.cli.common import print_json, print_table
    from nasbench.core.sizes import format_size
    from nasbench.model.shapes import DEFAULT_MODEL, MODELS
    from nasbench.spaces.placement import format_placement

    shapes = {name: MODELS[name] for name in MODELS}
    if as_json:
        names = ("family", "hidden_size", "head_dim", "max_context")
        models = [
            {
                "name": name,
                "layers": shape.num_layers,
                "heads": shape.num_heads,
                "kv_heads": shape.num_kv_heads,
                **{key: getattr(shape, key) for key in names},
                "parameters": shape.parameters(),
                "placement": format_placement(shape.placement),
                "weights": name == DEFAULT_MODEL,
            }
            for name, shape in shapes.items()
        ]
        print_json({"default": DEFAULT_MODEL, "models": models})
        return
    rows = [
        (
            name,
            shape.num_layers,
            shape.hidden_size,
            f"{shape.num_heads}/{shape.num_kv_heads} x {shape.head_dim}",
            f"{shape.parameters() / 1e9:.2f}B",
            format_size(shape.max_context),
            format_placement(shape.placement),
        )
        for name, shape in shapes.items()
    ]
    print_table(("name", "layers", "hidden", "heads", "params", "context", "placement"), rows)
    print(f"\n`default` is {DEFAULT_MODEL}, with its weights. The other shapes serve speed alone, with random weights.")
    print("--model also takes a local Hugging Face folder, a .gguf file of one of the families, or a hub name.")
