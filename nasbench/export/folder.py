"""Writes the folder: config, weights, tokenizer with its chat template, generation config, model card, licence."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from nasbench import __version__
from nasbench.checkpoints.families import FORMATS, write_config
from nasbench.checkpoints.load import LoadedModel
from nasbench.checkpoints.resolve import classify, model_folder
from nasbench.checkpoints.tensors import save_tensors
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError, unknown
from nasbench.core.files import atomic_path, read_json, write_json
from nasbench.export.card import Card, card_of, write_card
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.supernet.finalize import final_folder, final_version, is_final, load_final
from nasbench.supernet.supernet import Supernet

log = logging.getLogger("nasbench")


def export(
    run: Run, placement: Placement, out: Path, format: str = "hf", *, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Writes a placement of a run as a model folder and returns it. Finalised weights are taken where there are any.

    Args:
        out: a folder that does not exist or is empty. It appears whole or not at all.
        format: "hf" or "jet-nemotron".
        dtype: of the weights; parameters that a layer kind keeps in fp32 stay fp32.

    Raises:
        UserError: unknown format, a placement that the run or the format does not have, a folder with something in it.
        MachineError: the folder cannot be written.
    """
    check_export(format, out)
    placement = run.spec.space.check(placement)
    source = model_folder(classify(run.spec.model))[0]
    loaded, version, finalised = _load(run, placement, dtype)
    if not finalised:
        log.warning(
            "%s was never finalised: these are the supernet's weights. `nasbench finalize` trains it further",
            format_placement(placement),
        )
    card = card_of(run, placement, loaded.source, source, version, finalised)
    about = {"placement": card.placement, "weights": card.weights, "teacher": loaded.source}
    return write_model(
        loaded, out, format, {"nasbench": __version__, "run": run.path.resolve().name, **about}, card, source
    )


def check_export(format: str, out: Path) -> None:
    """Raises UserError for an unknown format and for an `out` that would be overwritten."""
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another folder, nothing is overwritten")


def _load(run: Run, placement: Placement, dtype: torch.dtype) -> tuple[LoadedModel, str, bool]:
    """(the placement's model, version of its weights, whether they were finalised). The model's own placement needs
    no training."""
    folder = final_folder(run, placement)
    if is_final(folder):
        return load_final(folder, dtype=dtype), final_version(folder), True
    net = Supernet.load(run, dtype=dtype)
    decoder = net.select(placement)
    loaded = LoadedModel(decoder, net.tokenizer, decoder.shape, net.source)
    return loaded, net.version, placement == run.spec.space.original


def write_model(
    loaded: LoadedModel, out: Path, format: str, about: dict[str, Any], card: Card | None = None,
    source: Path | None = None,
) -> Path:  # fmt: skip
    """Writes any loaded model as a folder of the format. Raises as `export`.

    Args:
        about: goes into its nasbench.json.
        source: the folder of the base model, whose generation settings, chat template and licence are taken.
    """
    check_export(format, out)
    spec, placement = loaded.shape, loaded.decoder.placement
    config, family = write_config(spec, placement, format)
    config["torch_dtype"] = str(loaded.decoder.dtype).removeprefix("torch.")
    eos, begin = loaded.tokenizer.eos_ids, loaded.tokenizer.bos_id
    ends = {
        "bos_token_id": _of_source(source, "config.json").get("bos_token_id") if begin is None else begin,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
    }
    config |= ends
    tensors = {
        theirs: value.cpu().contiguous()
        for name, tensor in loaded.decoder.state_dict().items()
        for theirs, value in family.split(name, tensor.detach(), spec, placement)
    }
    tensors = family.pack(tensors, spec, placement)
    with atomic_path(out, folder=True) as temporary:
        save_tensors(temporary / "model.safetensors", tensors)
        loaded.tokenizer.save(temporary / "tokenizer.json")
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(loaded.tokenizer, source))
        write_json(temporary / "generation_config.json", _of_source(source, "generation_config.json") | ends)
        write_json(temporary / "nasbench.json", about)
        write_json(temporary / "config.json", config)
        if card is not None:
            write_card(card, config, temporary / "README.md")
        for path in sorted(source.glob("LICENSE*") if source else ()):
            shutil.copyfile(path, temporary / path.name)
    return out


def _of_source(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the base model's folder, {} where there is none. References to code are left out."""
    path = source / name if source else None
    found = read_json(path) if path is not None and path.is_file() else {}
    return {key: value for key, value in found.items() if key != "auto_map"} if isinstance(found, dict) else {}


def _tokenizer_config(tokenizer: Tokenizer, source: Path | None) -> dict[str, Any]:
    """What transformers needs to read tokenizer.json, the base model's own settings over it; the chat template."""
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    found |= {name: tokenizer.backend.id_to_token(index) for name, index in special.items() if index is not None}
    found |= _of_source(source, "tokenizer_config.json") | {"chat_template": tokenizer.chat_template}
    return {name: value for name, value in found.items() if name != "chat_template" or value}
