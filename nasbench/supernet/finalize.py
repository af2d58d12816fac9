"""Distilling one chosen placement further, and reading it back.

runs/NAME/final/<slug>/final.json            model, placement, tokens, losses
runs/NAME/final/<slug>/mixers.safetensors    whole weights of every layer that is not the model's own attention
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nasbench.backbone.load import LoadedModel, load_model
from nasbench.blocks.mixer import TokenMixer
from nasbench.errors import UserError
from nasbench.files import atomic_path, read_json, write_json
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement, kind_of
from nasbench.supernet import checkpoint
from nasbench.supernet.loop import Loop, LossSums, Progress, no_progress, stop_on_signal
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import distill_step, training_corpus

CONFIG, MIXERS, TRAINING = "final.json", "mixers.safetensors", "training"
STAGE = "finalize"
_SEED_OFFSET = 7919


def slug(placement: Placement) -> str:
    """A placement as a folder name: `14J A 4J` -> `14J-A-4J`."""
    return format_placement(placement).replace(" ", "-")


def final_folder(run: Run, placement: Placement) -> Path:
    """Where a placement's finalised weights lie."""
    return run.final / slug(placement)


def finalize(
    run: Run,
    placement: Placement,
    config: DistillConfig,
    tokens: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = no_progress,
) -> Path:
    """Distils the placement for `tokens` tokens from the supernet's weights on, every replaced mixer being trained, and
    returns its folder. Stopping and starting again continues; the supernet itself stays as it is.

    Raises as `nasbench.supernet.train.distill`.
    """
    net = Supernet.load(run, dtype=dtype, device=device)
    net.space.check(placement)
    folder = final_folder(run, placement)
    corpus = training_corpus(run, net, config)
    rows = max(1, config.supernet_batch_tokens // corpus.sequence)
    steps = tokens // (rows * corpus.sequence)
    mixers = replaced_mixers(net, placement)

    def step(index: int, sums: LossSums) -> None:
        batch = corpus.batch(index, rows, run.spec.seed + _SEED_OFFSET).to(net.teacher.device)
        distill_step(net, placement, batch, sums, kl_chunk=config.kl_chunk, hidden_weight=config.hidden_weight)

    state = {"supernet": net.version, "tokens": tokens, "placement": format_placement(placement)}
    if mixers:
        for mixer in mixers.values():
            mixer.requires_grad_(True)
        groups = {name: dict(mixer.named_parameters()) for name, mixer in mixers.items()}
        optimizer = MasterAdamW(groups, lr=config.supernet_lr, weight_decay=config.weight_decay, clip=config.clip)
        with stop_on_signal() as stop:
            training = folder / TRAINING
            step_tokens = rows * corpus.sequence
            loop = Loop(training, STAGE, optimizer, steps, step_tokens, step, config, state, stop, progress)
            saved = checkpoint.latest(training)
            if saved is not None and all(saved.state.get(key) == value for key, value in state.items()):
                optimizer.set_masters(saved.weights(str(net.teacher.device)))
                loop.resume(saved)
            loop.losses.cut({STAGE: loop.start})
            loop.run()
        weights = {name: master.detach() for name, master in optimizer.masters.items()}
    else:
        weights = {}
    _write(folder, weights, {"model": run.spec.model, **state})
    checkpoint.discard(folder / TRAINING)
    return folder


def replaced_mixers(net: Supernet, placement: Placement) -> dict[str, TokenMixer]:
    """The placement's mixers that are not the teacher's own, by `layers.<i>.<name>`."""
    return {f"layers.{i}.{name}": net.mixer(i, name) for i, name in enumerate(placement) if kind_of(name) != "A"}


def _write(folder: Path, weights: dict[str, Tensor], data: dict[str, object]) -> None:
    with atomic_path(folder / MIXERS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
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


def load_final(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LoadedModel:
    """The finalised hybrid of a folder as a model ready to run. Raises UserError when it is damaged."""
    loaded = load_model(teacher_name(path), dtype=dtype, device=device)
    placement = loaded.shape.parse(_entry(path, "placement"))
    try:
        weights = load_file(path / MIXERS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / MIXERS} is corrupt ({error}): finalize again") from None
    mixers = []
    for i, name in enumerate(placement):
        if kind_of(name) == "A":
            mixers.append(loaded.decoder.layers[i].self_attn)
            continue
        mixer = loaded.shape.mixer(name).build().to(device=device, dtype=dtype)
        prefix = f"layers.{i}.{name}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        try:
            mixer.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).split("\n")[-1].strip()
            raise UserError(f"{path / MIXERS} does not fit layer {i} ({name}): {reason}") from None
        mixers.append(mixer.eval().requires_grad_(False))
    decoder = loaded.decoder.with_mixers(mixers, placement)
    return LoadedModel(decoder, loaded.tokenizer, loaded.shape, f"{path} (finalised from {loaded.source})")
