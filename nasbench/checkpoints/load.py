"""Decoders with weights: read from a model folder, or random where only speed counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nasbench.checkpoints import hf_folder
from nasbench.checkpoints.families import FAMILIES
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
    try:
        tokenizer = tokenizer_from_json(folder / "tokenizer.json", hf_folder.end_tokens(folder), shape.vocab_size)
        decoder = load_decoder(folder, shape, dtype=dtype, device=device)
    except UserError as error:  # names the user's file, not the cache
        raise UserError(str(error).replace(str(folder), name)) from None
    return LoadedModel(decoder, tokenizer, shape, source)


def load_decoder(
    folder: Path, shape: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a model folder in evaluation mode. Parameters that a block keeps in fp32 stay fp32. On the meta
    device it has no values, and nothing is read."""
    files = hf_folder.weight_files(folder)
    shapes = {name: sizes for path in files for name, sizes in hf_folder.tensor_shapes(path).items()}
    decoder = _empty_decoder(shape, dtype, len(shapes), str(folder))
    slots = decoder.state_dict()
    places = find_places(shapes, shape, slots, str(folder))
    if torch.device(device).type == "meta":
        return decoder.eval()
    values: dict[str, Tensor] = {}
    with _out_of_memory(device):
        for path in files:
            for name, tensor in _unpacked(hf_folder.read_tensors(path), shape):
                place = places[name]
                if place is None:
                    continue
                slot = slots[place.name]
                changed = place.shift or place.scale != 1
                value = (tensor.to(device, torch.float32) + place.shift) * place.scale if changed else tensor
                value = value.to(device, slot.dtype)
                _check_values(name, tensor.dtype, value, path)
                if not place.index:
                    values[place.name] = value
                    continue
                if place.name not in values:
                    values[place.name] = torch.empty_like(slot, device=device)
                values[place.name][place.index] = value
    decoder.load_state_dict(values, assign=True)
    _materialise_buffers(decoder, device)
    return decoder.eval()


def _empty_decoder(shape: ModelSpec, dtype: torch.dtype, tensors: int, where: str) -> Decoder:
    """A decoder without memory, for a checkpoint of that many tensors: thousands of layers would take long to make."""
    if tensors < shape.num_layers:
        raise UserError(f"{where} has {tensors} tensors, too few for {shape.num_layers} layers")
    with _built_on("meta", dtype):
        return Decoder(shape, shape.placement)


_EMBEDDING = "model.embed_tokens.weight"


def find_places(
    shapes: dict[str, tuple[int, ...]], shape: ModelSpec, slots: dict[str, Tensor] | None, where: str
) -> dict[str, Place | None]:
    """Where each tensor of a checkpoint goes; None for what repeats other data, as a tied output matrix.

    Raises:
        UserError: the tensors are not exactly those of the model.
    """
    family = FAMILIES[shape.family]()
    slots = slots or _empty_decoder(shape, torch.float32, len(shapes), where).state_dict()
    stored = ((name, torch.empty(sizes, device="meta")) for name, sizes in shapes.items())
    tensors = dict(_unpacked(stored, shape))
    places = {name: family.place(name, shape) for name in tensors}
    if shape.tie_embeddings:
        embedded = any(place is not None and place.name == _EMBEDDING for place in places.values())
        for name, place in places.items():
            if place is not None and place.name == "lm_head.weight":  # the one matrix may stand under either name
                places[name] = None if embedded else Place(_EMBEDDING)
    filled = dict.fromkeys(slots, 0)
    for name, place in places.items():
        if place is None:
            continue
        sizes = tensors[name].shape
        slot = slots.get(place.name)
        if slot is None or (place.index and int(place.index[0]) >= len(slot)):
            raise UserError(
                f"{where} has a tensor {name} that a {shape.family} model of this configuration does not have"
            )
        wanted = slot[place.index].shape
        if tuple(sizes) != tuple(wanted):
            raise UserError(f"{where}: {name} has shape {list(sizes)}, the configuration says {list(wanted)}")
        filled[place.name] += math.prod(sizes)
    missing = [name for name, slot in slots.items() if filled[name] != slot.numel()]
    if missing:
        (theirs, _), *_ = family.split(missing[0], slots[missing[0]], shape, shape.placement)
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(f"{where} lacks {theirs}{more}")
    return places


def _unpacked(tensors: Iterable[tuple[str, Tensor]], shape: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    family = FAMILIES[shape.family]()
    for name, tensor in tensors:
        yield from family.unpack(name, tensor, shape)


def _check_values(name: str, dtype: torch.dtype, value: Tensor, path: Path) -> None:
    """Refuses quantised weights and values that are not finite: one makes every output NaN, later and elsewhere."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"{path}: {name} is {dtype}: quantised checkpoints are not supported")
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise UserError(f"{path}: {name} holds values that are not finite in {value.dtype}")


def _materialise_buffers(decoder: Decoder, device: torch.device | str) -> None:
    """Gives blocks the buffers that no checkpoint holds: a block built on the meta device has none of their values."""
    for layer in decoder.layers:
        for block in (layer.self_attn, layer.mlp):
            if any(buffer.is_meta for buffer in block.buffers()):
                with torch.device(device):
                    fresh = dict(block.spec.build().named_buffers())
                for name, buffer in list(block.named_buffers()):
                    if buffer.is_meta:
                        owner, _, leaf = name.rpartition(".")
                        setattr(block.get_submodule(owner), leaf, fresh[name])


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
