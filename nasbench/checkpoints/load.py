"""Decoders with weights: read from a model folder, or random where only speed counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nasbench.checkpoints import hf_folder
from nasbench.checkpoints.resolve import classify, model_folder, resolve_shape
from nasbench.checkpoints.tokenizer import Tokenizer, tokenizer_from_json
from nasbench.core.errors import MachineError, UserError
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

__all__ = ["LoadedModel", "load_decoder", "load_model", "random_decoder", "resolve_shape"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        source: where the weights came from, for reports.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    shape: ModelSpec
    source: str


def load_model(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LoadedModel:
    """Loads weights and tokenizer of `default`, a local folder, a .gguf file or a hub name.

    Raises:
        UserError: no such model, no weights, a corrupt or unsupported file.
        MachineError: it cannot be fetched, or does not fit in memory.
    """
    folder, shape, source = model_folder(classify(name))
    tokenizer = tokenizer_from_json(folder / "tokenizer.json", hf_folder.read_config(folder))
    decoder = load_decoder(folder, shape, dtype=dtype, device=device)
    return LoadedModel(decoder, tokenizer, shape, source)


def load_decoder(
    folder: Path, shape: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a model folder in evaluation mode. Parameters that a mixer keeps in fp32 stay fp32."""
    files = hf_folder.weight_files(folder)
    with _built_on("meta", dtype):
        decoder = Decoder(shape, shape.placement)
    expected = decoder.state_dict()
    found = set()
    with _out_of_memory(device):
        for path in files:
            for name, tensor in hf_folder.read_tensors(path):
                if name not in expected:
                    _refuse_extra(name, path, shape)
                    continue
                slot = expected[name]
                if tensor.shape != slot.shape:
                    raise UserError(
                        f"{path}: {name} has shape {list(tensor.shape)}, the configuration says {list(slot.shape)}"
                    )
                found.add(name)
                decoder.load_state_dict({name: tensor.to(device, slot.dtype)}, strict=False, assign=True)
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks {missing[0]}{more}")
    _materialise_buffers(decoder, device)
    return decoder.eval()


def _refuse_extra(name: str, path: Path, shape: ModelSpec) -> None:
    """Lets through what repeats other data: a tied output matrix, old checkpoints' rotary tables."""
    if not (name == "lm_head.weight" and shape.tie_embeddings) and not name.endswith("rotary_emb.inv_freq"):
        raise UserError(f"{path} has a tensor {name} that a {shape.family} model of this configuration does not have")


def _materialise_buffers(decoder: Decoder, device: torch.device | str) -> None:
    """Gives mixers the buffers that no checkpoint holds: a mixer built on the meta device has none of their values."""
    for layer in decoder.layers:
        mixer = layer.self_attn
        if any(buffer.is_meta for buffer in mixer.buffers()):
            with torch.device(device):
                fresh = dict(mixer.spec.build().named_buffers())
            for name, buffer in list(mixer.named_buffers()):
                if buffer.is_meta:
                    owner, _, leaf = name.rpartition(".")
                    setattr(mixer.get_submodule(owner), leaf, fresh[name])


def random_decoder(
    shape: ModelSpec,
    placement: Placement,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Decoder:
    """A decoder with random weights of ordinary size, made on the device in `dtype`: for speed, not for text."""
    generator_devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with _out_of_memory(device), torch.random.fork_rng(devices=generator_devices):
        torch.manual_seed(seed)
        with _built_on(device, dtype):
            decoder = Decoder(shape, placement)
        nn.init.normal_(decoder.model.embed_tokens.weight, std=0.02)
    return decoder.eval()


@contextmanager
def _built_on(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their parameters on `device` in `dtype`, unless they choose a dtype themselves."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _out_of_memory(device: torch.device | str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"the model does not fit in the memory of {device}") from error
