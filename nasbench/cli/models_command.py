"""nasbench models: the shapes that --model knows by name."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """List the built-in model shapes and the default model."""
    from nasbench.cli.common import print_json, print_table
    from nasbench.core.sizes import format_size
    from nasbench.model.shapes import DEFAULT_MODEL, MODELS
    from nasbench.spaces.placement import format_placement

    models: list[dict[str, Any]] = []
    for name in MODELS:
        shape = MODELS[name]
        models.append(
            {
                "name": name,
                "family": shape.family,
                "layers": shape.num_layers,
                "hidden_size": shape.hidden_size,
                "heads": shape.num_heads,
                "kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "parameters": shape.parameters(),
                "max_context": shape.max_context,
                "placement": format_placement(shape.placement),
                "weights": name == DEFAULT_MODEL,
            }
        )
    if as_json:
        print_json({"default": DEFAULT_MODEL, "models": models})
        return
    rows = [
        [
            model["name"],
            model["layers"],
            model["hidden_size"],
            f"{model['heads']}/{model['kv_heads']} x {model['head_dim']}",
            f"{model['parameters'] / 1e9:.2f}B",
            format_size(model["max_context"]),
            model["placement"],
        ]
        for model in models
    ]
    print_table(("name", "layers", "hidden", "heads", "params", "context", "placement"), rows)
    print(f"\n`default` is {DEFAULT_MODEL}, with its weights. The other shapes serve speed alone, with random weights.")
    print("--model also takes a local Hugging Face folder, a .gguf file of one of the families, or a hub name.")
