"""A placement of a run as a model folder that other engines load: config.json, safetensors, tokenizer.

`hf` writes the family's own format where that can express the placement (transformers loads it), and model_type
`nasbench` for other hybrids (nasbench loads it). `jet-nemotron` writes `JetNemotronForCausalLM`, the format of the
published Jet-Nemotron checkpoints, for placements of A, W and J.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nasbench import __version__
from nasbench.checkpoints.families import FORMATS, write_config
from nasbench.checkpoints.load import LoadedModel
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.core.files import machine_errors, write_json
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.supernet.finalize import final_folder, is_final, load_final
from nasbench.supernet.supernet import Supernet


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
    loaded, weights = _load(run, placement, dtype)
    about = {"placement": format_placement(placement), "weights": weights, "teacher": loaded.source}
    return write_model(loaded, out, format, {"nasbench": __version__, "run": run.path.resolve().name, **about})


def check_export(format: str, out: Path) -> None:
    """Raises UserError for an unknown format and for an `out` that would be overwritten."""
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another folder, nothing is overwritten")


def _load(run: Run, placement: Placement, dtype: torch.dtype) -> tuple[LoadedModel, str]:
    """(the placement's model, which weights it has)."""
    folder = final_folder(run, placement)
    if is_final(folder):
        return load_final(folder, dtype=dtype), f"finalised ({folder.name})"
    net = Supernet.load(run, dtype=dtype)
    decoder = net.select(placement)
    return LoadedModel(decoder, net.tokenizer, decoder.shape, net.source), f"supernet {net.version}"


def write_model(loaded: LoadedModel, out: Path, format: str, about: dict[str, Any]) -> Path:
    """Writes any loaded model as a folder of the format. `about` goes into its nasbench.json. Raises as `export`."""
    check_export(format, out)
    spec, placement = loaded.shape, loaded.decoder.placement
    config, family = write_config(spec, placement, format)
    config["torch_dtype"] = str(loaded.decoder.dtype).removeprefix("torch.")
    eos = loaded.tokenizer.eos_ids
    config["bos_token_id"] = loaded.tokenizer.bos_id
    config["eos_token_id"] = list(eos) if len(eos) > 1 else next(iter(eos), None)
    tensors = {
        theirs: value.cpu().contiguous()
        for name, tensor in loaded.decoder.state_dict().items()
        for theirs, value in family.split(name, tensor.detach(), spec, placement)
    }
    tensors = family.pack(tensors, spec, placement)
    with machine_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _save(tensors, temporary / "model.safetensors")
            loaded.tokenizer.save(temporary / "tokenizer.json")
            write_json(temporary / "tokenizer_config.json", _tokenizer_config(loaded.tokenizer))
            write_json(temporary / "nasbench.json", about)
            write_json(temporary / "config.json", config)
            temporary.chmod(0o755)
            temporary.replace(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file; its errors, which are no OSErrors, become ours."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        reason = "no space left on the disk" if "os error 28" in str(error) else str(error)
        raise MachineError(f"writing {path.name}: {reason}") from error


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers needs to read tokenizer.json as a fast tokenizer."""
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    texts = {name: tokenizer.backend.id_to_token(index) for name, index in special.items() if index is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts}
