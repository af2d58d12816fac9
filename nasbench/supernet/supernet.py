"""The once-for-all supernet: beside every layer's attention stand its alternatives; everything else is shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nasbench.backbone.decoder import Decoder
from nasbench.backbone.load import LoadedModel, load_model
from nasbench.backbone.tokenizer import Tokenizer
from nasbench.blocks.full_attention_mixer import FullAttention
from nasbench.blocks.mixer import TokenMixer
from nasbench.errors import UserError
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement, kind_of
from nasbench.spaces.space import Space
from nasbench.supernet import checkpoint


class Supernet:
    """A frozen teacher and one mixer per layer and alternative.

    Attributes:
        teacher: the original decoder; its layer i's attention is the alternative "A" of layer i.
        space: what every layer may choose from.
        frozen: letters of the kinds whose weights are the attention's and are not trained.
        version: names the weights: "init" before training, else the checkpoint's digest.
    """

    def __init__(
        self, loaded: LoadedModel, space: Space, frozen: tuple[str, ...], mixers: dict[tuple[int, str], TokenMixer]
    ) -> None:
        self.teacher: Decoder = loaded.decoder
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.source = loaded.source
        self.space = space
        self.frozen = frozen
        self.version = "init"
        self._mixers = mixers

    @classmethod
    def build(cls, loaded: LoadedModel, space: Space, frozen: tuple[str, ...] = ("W",), seed: int = 0) -> Supernet:
        """Alternatives that start from the attention they stand beside (`init_from_attention`).

        Raises UserError when the model's own layers are not all full attention, or its depth is not the space's.
        """
        teacher = loaded.decoder
        check_teacher(teacher, space)
        teacher.requires_grad_(False)
        mixers: dict[tuple[int, str], TokenMixer] = {}
        with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for i, layer in enumerate(teacher.layers):
                for name in space.fillers(i):
                    mixers[i, name] = _from_attention(teacher, layer.self_attn, name, kind_of(name) not in frozen)
        return cls(loaded, space, frozen, mixers)

    def mixer(self, layer: int, name: str) -> TokenMixer:
        """The mixer that stands for `name` in a layer; the teacher's own for full attention."""
        return self.teacher.layers[layer].self_attn if kind_of(name) == "A" else self._mixers[layer, name]

    def select(self, placement: Placement) -> Decoder:
        """The sub-network of a placement. It shares every weight with the supernet. Raises UserError if not legal."""
        self.space.check(placement)
        return self.teacher.with_mixers([self.mixer(i, name) for i, name in enumerate(placement)], placement)

    def mixers(self) -> Iterator[TokenMixer]:
        """Every alternative of every layer."""
        return iter(self._mixers.values())

    def trained(self) -> dict[str, TokenMixer]:
        """The mixers that training changes, by the name under which their weights are saved, e.g. `layers.3.J`."""
        return {
            f"layers.{layer}.{name}": mixer
            for (layer, name), mixer in self._mixers.items()
            if kind_of(name) not in self.frozen
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of every trained mixer, cast to the dtype that each parameter has. Raises UserError."""
        expected = {
            f"{group}.{name}": parameter
            for group, mixer in self.trained().items()
            for name, parameter in mixer.named_parameters()
        }
        for name, parameter in expected.items():
            if name not in weights or weights[name].shape != parameter.shape:
                raise UserError(f"the supernet's weights lack {name} of shape {list(parameter.shape)}: distil again")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Writes the trained mixers' weights (fp32) as a checkpoint that `Supernet.load` reads."""
        weights = {
            f"{group}.{name}": parameter.float()
            for group, mixer in self.trained().items()
            for name, parameter in mixer.named_parameters()
        }
        state = {"stage": "done", "step": 0, "frozen": list(self.frozen)}
        self.version = checkpoint.save(folder, "done-00000000", weights, {}, state).version

    @classmethod
    def load(cls, run: Run, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Supernet:
        """The newest supernet of a run, finished or not. Raises UserError when there is none or it is damaged."""
        saved = checkpoint.latest(run.supernet)
        if saved is None:
            raise UserError(f"{run.path} has no supernet yet: run `nasbench distill --out {run.path}` first")
        loaded = load_model(run.spec.model, dtype=dtype, device=device)
        net = cls.build(loaded, run.spec.space, tuple(saved.state["frozen"]), run.spec.seed)
        net.load_weights(saved.weights(str(device)))
        for mixer in net.trained().values():
            mixer.requires_grad_(False)
        net.version = saved.version
        return net


def check_teacher(teacher: Decoder, space: Space) -> None:
    """Raises UserError unless the teacher is a full-attention model of the space's depth."""
    if set(map(kind_of, teacher.placement)) != {"A"}:
        raise UserError(f"{teacher.shape.name} is no full-attention model: it is {format_placement(teacher.placement)}")
    if len(teacher.layers) != space.num_layers:
        raise UserError(f"{teacher.shape.name} has {len(teacher.layers)} layers, the space {space.num_layers}")


def _from_attention(teacher: Decoder, attention: nn.Module, name: str, trained: bool) -> TokenMixer:
    assert isinstance(attention, FullAttention)
    config = teacher.shape.mixer(name)
    mixer = config.mixer_class().init_from_attention(config, attention)
    return mixer.requires_grad_(trained).train(teacher.training)
