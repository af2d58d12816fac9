"""Distilling one chosen placement further, and reading it back.

runs/NAME/final/<slug>/final.json            model, placement, tokens, settings
runs/NAME/final/<slug>/mixers.safetensors    whole weights of every layer that is not the model's own attention, or of
                                             every weight that was trained
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nasbench.checkpoints.load import LoadedModel, load_model
from nasbench.checkpoints.tensors import write_tensors
from nasbench.core.errors import UserError
from nasbench.core.files import plain_name, read_json, write_json
from nasbench.data.packing import Corpus
from nasbench.parallel import fsdp
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement, parse_placement
from nasbench.spaces.space import Space
from nasbench.supernet import checkpoint
from nasbench.supernet.loop import Loop, Notice, Progress, silent, stop_on_signal
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.steps import REST, SubnetStage
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import training_corpus

CONFIG, MIXERS, TRAINING = "final.json", "mixers.safetensors", "training"
STAGE = "finalize"
AVERAGE = "average"
"""Name of the mean of finalised weights with those before."""
_SEED_OFFSET = 7919
_SETTINGS = (
    "supernet_batch_tokens", "supernet_lr", "warmup", "weight_decay", "clip", "hidden_weight", "whole", "whole_rate",
    "documents", "repeat_share",
)  # fmt: skip


def final_folder(run: Run, placement: Placement, name: str = "") -> Path:
    """Where a placement's finalised weights lie, as final/14J-A-4J@NAME; `name` tells several trainings of one
    placement apart."""
    slug = format_placement(placement).replace(" ", "-")
    return run.final / (plain_name("variant", f"{slug}@{name}") if name else slug)


def finalize(
    run: Run,
    placement: Placement,
    config: DistillConfig,
    tokens: int,
    *,
    sequence: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
    notice: Notice = silent,
    workers: DistContext = SINGLE,
    name: str = "",
    loaded: LoadedModel | None = None,
    corpus: Corpus | None = None,
) -> Path:
    """Trains every replaced mixer of the placement for `tokens` tokens from the supernet's weights on, and returns its
    folder. The supernet stays as it is. A stopped training continues; a finished one takes more tokens in another cycle
    of the learning rate.

    Args:
        sequence: tokens of a row; the run's by default, longer to learn what only long texts show.
        name: of this training, where a placement has several.
        loaded, corpus: the run's model, and text in rows, where they have been read already.

    Raises as `nasbench.supernet.train.distill`.
    """
    fsdp.check(config.shard)
    net = Supernet.load(run, dtype=dtype, device=fsdp.place_of(config.shard, device, workers), loaded=loaded)
    placement = net.space.check(placement)
    folder = final_folder(run, placement, name)
    corpus = training_corpus(run, net, config, sequence, corpus)
    rows = max(1, config.supernet_batch_tokens // corpus.sequence)
    step_tokens = rows * corpus.sequence
    state: dict[str, Any] = {
        "supernet": net.version,
        "placement": format_placement(placement),
        "settings": {
            **{key: getattr(config, key) for key in _SETTINGS},
            "sequence": corpus.sequence,
            "corpus": corpus.fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
        },
    }
    saved, finished = _earlier(folder, state, tokens)
    if finished and finished[-1] == tokens:
        return folder
    known = saved.state["cycles"] if saved is not None else finished
    cycles = [*known, tokens] if tokens // step_tokens > (known[-1] if known else 0) // step_tokens else known
    state["cycles"] = cycles or [tokens]
    if config.whole:
        own_layers(net, placement)
    for parameters in trained_parts(net, placement).values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    fsdp.spread(net, config.shard, workers)
    groups = trained_parts(net, placement)
    weights: dict[str, Tensor] = {}
    if groups:
        place = "cpu" if config.shard else str(net.teacher.device)
        fitting = {f"layers.{i}.{part}" for i in range(len(placement)) for part in ("A", REST)}
        optimizer = MasterAdamW(
            groups, lr=config.supernet_lr, weight_decay=config.weight_decay, clip=config.clip,
            rate=lambda group: config.whole_rate if group in fitting else 1.0,
        )  # fmt: skip
        if saved is not None:
            optimizer.set_masters(saved.weights(place))
        elif finished:
            optimizer.set_masters(load_file(folder / MIXERS, device=place))
        stage = SubnetStage(
            STAGE, net, optimizer, corpus, rows, run.spec.seed + _SEED_OFFSET, config, workers,
            lambda index: [placement], [(kind,) for kind in placement],
        )  # fmt: skip
        start = finished[-1] // step_tokens if finished and saved is None else 0
        ends = [end // step_tokens for end in state["cycles"]]
        with stop_on_signal() as stop:
            loop = Loop(folder / TRAINING, stage, ends, state, stop, progress, notice, start)
            loop.run(saved if saved is not None and saved.state["step"] else None)
        weights = optimizer.weights()
        if config.shard:
            weights = fsdp.full_state_dict(weights, workers.is_main)
    if workers.is_main:
        _write(folder, weights, {"model": run.spec.model, **state, "tokens": tokens})
        checkpoint.discard(folder / TRAINING)
    return folder


def _earlier(folder: Path, state: dict[str, Any], tokens: int) -> tuple[checkpoint.Checkpoint | None, list[int]]:
    """The checkpoint of this training, and the cycles of a finished one; None and no cycles where they are of another
    training or had more than `tokens`."""

    def fits(known: Any) -> bool:
        if not isinstance(known, dict) or any(known.get(key) != value for key, value in state.items()):
            return False
        cycles = known.get("cycles")
        return (
            isinstance(cycles, list)
            and all(isinstance(end, int) for end in cycles)
            and max(cycles, default=tokens + 1) <= tokens
        )

    saved = checkpoint.latest(folder / TRAINING)
    data: Any = read_json(folder / CONFIG) if is_final(folder) and (folder / MIXERS).is_file() else None
    return saved if saved is not None and fits(saved.state) else None, list(data["cycles"]) if fits(data) else []


def own_layers(net: Supernet, placement: Placement) -> None:
    """Gives the hybrid its own copies of MLP and norms, and of the attention that stays, from the first replaced layer
    on. The layers before it read what they read in the teacher, and stay as they are."""
    first = net.space.first_changed(placement)
    for i, name in enumerate(placement[first:], first):
        layer = net.teacher.layers[i]
        mixer = copy.deepcopy(layer.self_attn) if net.space.is_original(i, name) else net.mixer(i, name)
        own = copy.deepcopy(layer.with_mixer(mixer), {id(mixer): mixer})
        net.own[i, name] = own.train(net.teacher.training)


def trained_parts(net: Supernet, placement: Placement) -> dict[str, dict[str, nn.Parameter]]:
    """What finalising trains: the parameters of every replaced mixer, by `layers.<i>.<name>`; of a hybrid with layers
    of its own also those of its attention and, by `layers.<i>.rest`, of all else in the layer."""
    parts = {}
    for i, name in enumerate(placement):
        own = net.own.get((i, name))
        if own is not None or not net.space.is_original(i, name):
            mixer = net.mixer(i, name) if own is None else own.self_attn
            parts[f"layers.{i}.{name}"] = dict(mixer.named_parameters())
        if own is not None:
            named = own.named_parameters()
            parts[f"layers.{i}.{REST}"] = {key: p for key, p in named if not key.startswith("self_attn.")}
    return parts


def _write(folder: Path, weights: dict[str, Tensor], data: dict[str, Any]) -> None:
    write_tensors(folder / MIXERS, weights)
    write_json(folder / CONFIG, data)


def is_final(path: Path) -> bool:
    """Whether a folder holds a finalised hybrid."""
    return (path / CONFIG).is_file()


def _entry(path: Path, key: str) -> str:
    data = read_json(path / CONFIG)
    if not isinstance(data, dict) or not isinstance(data.get(key), str):
        raise UserError(f"{path / CONFIG} lacks {key!r}: finalize again")
    return str(data[key])


def teacher_name(path: Path) -> str:
    """The model that a finalised hybrid was made from, as given to --model. Raises UserError."""
    return _entry(path, "model")


def use_final(net: Supernet, folder: Path) -> Placement:
    """Puts a finalised hybrid's weights into the supernet that it was made from, and returns its placement; other
    placements are then of mixed weights. Raises UserError when it is damaged."""
    placement = net.space.check(parse_placement(_entry(folder, "placement")))
    weights = _weights(folder, net.teacher.device)
    with torch.no_grad():
        for key, parameter in _counterparts(net, placement, weights, folder).items():
            parameter.copy_(weights[key])
    net.version = final_version(folder)
    return placement


def final_version(folder: Path) -> str:
    """Names finalised weights: what `use_final` makes the supernet's version, without reading them into one."""
    return checkpoint.digest(folder / MIXERS)


def _counterparts(
    net: Supernet, placement: Placement, weights: dict[str, Tensor], folder: Path
) -> dict[str, nn.Parameter]:
    """The supernet's parameters that finalised weights began from, by the names of those; a hybrid that was trained
    whole gets its own layers. Raises UserError where a weight is missing or of another shape."""
    if any(f".{REST}." in key for key in weights):
        own_layers(net, placement)
    found = {
        f"{group}.{name}": parameter
        for group, parameters in trained_parts(net, placement).items()
        for name, parameter in parameters.items()
    }
    for key, parameter in found.items():
        if key not in weights or weights[key].shape != parameter.shape:
            raise UserError(f"{folder / MIXERS} lacks {key} of shape {list(parameter.shape)}: finalize again")
    return found


def average_final(
    run: Run,
    placement: Placement,
    name: str,
    *,
    of: str = "",
    share: float = 0.5,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a finalised hybrid's weights averaged with those that its training began from, and returns their folder:
    between the two lies what it learnt without all that it forgot for it (WiSE-FT, arXiv 2109.01903).

    Args:
        name: of the new folder; `of`: of the training that it is made from.
        share: of the finalised weights, 0 to 1.

    Raises UserError when the finalised weights are damaged or are of another supernet.
    """
    source, folder = final_folder(run, placement, of), final_folder(run, placement, name)
    parameters, weights = before_and_after(Supernet.load(run, dtype=dtype), source, placement)
    for key, start in parameters.items():
        weights[key] = mean_of(start.detach(), weights[key], share)
    _write(folder, weights, {**read_json(source / CONFIG), "averaged": share})
    return folder


def before_and_after(
    net: Supernet, folder: Path, placement: Placement
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The supernet's parameters that a training began from, and what it made of them, by name. Raises UserError."""
    data, weights = read_json(folder / CONFIG), _weights(folder, net.teacher.device)
    if not isinstance(data, dict) or data.get("supernet") != net.version:
        raise UserError(f"{folder} was not finalised from the supernet that its run has now: finalize again")
    return _counterparts(net, placement, weights, folder), weights


def mean_of(before: Tensor, after: Tensor, share: float) -> Tensor:
    """The mean in which `after` has this share, in its dtype."""
    return torch.lerp(before.float(), after.float(), share).to(after.dtype)


def _weights(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(path / MIXERS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / MIXERS} is corrupt ({error}): finalize again") from None


def load_final(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LoadedModel:
    """The finalised hybrid of a folder as a model ready to run. Raises UserError when it is damaged."""
    loaded = load_model(teacher_name(path), dtype=dtype, device=device)
    placement = loaded.shape.parse(_entry(path, "placement"))
    own = loaded.decoder.placement
    # A supernet of nothing but this hybrid.
    space = Space(tuple(tuple(dict.fromkeys(names)) for names in zip(own, placement, strict=True)))
    net = Supernet(loaded, space)
    use_final(net, path)
    decoder = net.select(placement).requires_grad_(False)
    return LoadedModel(decoder, loaded.tokenizer, loaded.shape, f"{path} (finalised from {loaded.source})")
