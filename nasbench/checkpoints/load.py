"""Decoders with weights: read from a model folder, or random where only speed counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nasbench.checkpoints import hf_folder
from nasbench.checkpoints.families import FAMILIES, Family
from nasbench.checkpoints.families.family import Place
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
    tokenizer = tokenizer_from_json(folder / "tokenizer.json", hf_folder.end_tokens(folder), shape.vocab_size)
    decoder = load_decoder(folder, shape, dtype=dtype, device=device)
    return LoadedModel(decoder, tokenizer, shape, source)


def load_decoder(
    folder: Path, shape: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a model folder in evaluation mode. Parameters that a block keeps in fp32 stay fp32."""
    files = hf_folder.weight_files(folder)
    family = FAMILIES[shape.family]()
    with _built_on("meta", dtype):
        decoder = Decoder(shape, shape.placement)
    slots = decoder.state_dict()
    filled: dict[str, int] = {}
    parted: dict[str, Tensor] = {}
    with _out_of_memory(device):
        for path in files:
            for name, tensor in hf_folder.read_tensors(path):
                place = _find(family, name, tuple(tensor.shape), slots, shape, str(path))
                if place is None:
                    continue
                filled[place.name] = filled.get(place.name, 0) + tensor.numel()
                value = tensor.to(device, slots[place.name].dtype)
                _check_values(name, tensor.dtype, value, path)
                if place.shift:
                    value = (tensor.to(device, torch.float32) + place.shift).to(value.dtype)
                if place.index:
                    if place.name not in parted:
                        parted[place.name] = torch.empty_like(slots[place.name], device=device)
                    parted[place.name][place.index] = value
                    value = parted[place.name]
                decoder.load_state_dict({place.name: value}, strict=False, assign=True)
    _check_filled(slots, filled, shape, str(folder))
    _materialise_buffers(decoder, device)
    return decoder.eval()


def check_tensors(shapes: dict[str, tuple[int, ...]], shape: ModelSpec, where: str) -> None:
    """Raises UserError unless the checkpoint's tensors of these shapes are exactly those of the model."""
    family = FAMILIES[shape.family]()
    with _built_on("meta", torch.float32):
        slots = Decoder(shape, shape.placement).state_dict()
    filled: dict[str, int] = {}
    for name, sizes in shapes.items():
        place = _find(family, name, sizes, slots, shape, where)
        if place is not None:
            filled[place.name] = filled.get(place.name, 0) + math.prod(sizes)
    _check_filled(slots, filled, shape, where)


def _find(
    family: Family, name: str, sizes: tuple[int, ...], slots: dict[str, Tensor], shape: ModelSpec, where: str
) -> Place | None:
    """Where a tensor goes; None for what repeats other data: a tied output matrix, old checkpoints' rotary tables."""
    place = family.place(name, shape)
    if place is None or (place.name == "lm_head.weight" and shape.tie_embeddings):
        return None
    slot = slots.get(place.name)
    try:
        wanted = None if slot is None else list(slot[place.index].shape)
    except IndexError:
        wanted = None
    if wanted is None:
        raise UserError(f"{where} has a tensor {name} that a {shape.family} model of this configuration does not have")
    if list(sizes) != wanted:
        raise UserError(f"{where}: {name} has shape {list(sizes)}, the configuration says {wanted}")
    return place


def _check_filled(slots: dict[str, Tensor], filled: dict[str, int], shape: ModelSpec, where: str) -> None:
    missing = [name for name, slot in slots.items() if filled.get(name, 0) != slot.numel()]
    if missing:
        (theirs, _), *_ = FAMILIES[shape.family]().split(missing[0], slots[missing[0]], shape, shape.placement)
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(f"{where} lacks {theirs}{more}")


_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_values(name: str, dtype: torch.dtype, value: Tensor, path: Path) -> None:
    """Refuses quantised weights and values that are not finite: one makes every output NaN, later and elsewhere."""
    if dtype not in _WEIGHTS:
        raise UserError(
            f"{path}: {name} is {str(dtype).removeprefix('torch.')}: quantised checkpoints are not supported"
        )
    if value.numel():
        low, high = value.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise UserError(
                f"{path}: {name} holds values that are not finite in {str(value.dtype).removeprefix('torch.')}"
            )


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
