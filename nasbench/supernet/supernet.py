"""The once-for-all supernet: beside every layer's attention stand its alternatives; everything else is shared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from nasbench.checkpoints.load import LoadedModel, load_model
from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError
from nasbench.model.block import Block
from nasbench.model.decoder import Decoder, DecoderLayer
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.parallel.fsdp import assign
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement, is_of
from nasbench.spaces.space import Space
from nasbench.supernet import checkpoint
from nasbench.supernet.ridge import out_name


class Supernet:
    """A frozen teacher and one mixer per layer and alternative.

    Attributes:
        teacher: the original decoder; its layer i's attention is the alternative "A" of layer i.
        space: what every layer may choose from.
        frozen: letters of the kinds whose weights are the attention's and are not trained.
        solved: those among them whose output projection is solved in closed form all the same.
        own: layers of one finalised hybrid with its own MLP and norms, by index and name; the teacher's never change.
        version: names the weights: "init" before training, else the checkpoint's digest.
        shards: of sharded weights (nasbench.parallel.fsdp), all their FSDP units.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        space: Space,
        frozen: tuple[str, ...] = ("W",),
        seed: int = 0,
        *,
        transfer: bool = True,
        solved: tuple[str, ...] = (),
    ) -> None:
        """Alternatives that start from the attention they stand beside (`init_from_attention`); without `transfer`
        those that are trained start random.

        Raises UserError when the model's own layers are not all attention, or not the space's originals.
        """
        self.teacher: Decoder = loaded.decoder
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.source = loaded.source
        self.space, self.frozen, self.solved = space, frozen, solved
        self.version = "init"
        self.own: dict[tuple[int, str], DecoderLayer] = {}
        self.shards: nn.Module | None = None
        self._mixers: dict[tuple[int, str], Block] = {}
        teacher = self.teacher
        check_teacher(teacher, space)
        teacher.requires_grad_(False)
        with torch.random.fork_rng(devices=[teacher.device] if teacher.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for i, layer in enumerate(teacher.layers):
                for name in space.alternatives(i):
                    trained = not is_of(name, frozen)
                    spec, attention = teacher.shape.mixer(name, i), layer.self_attn
                    assert isinstance(attention, FullAttention)
                    if transfer or not trained:
                        mixer = spec.block_class().init_from_attention(spec, attention)
                    else:
                        mixer = spec.build().to(teacher.device, teacher.dtype)
                    self._mixers[i, name] = mixer.requires_grad_(trained).train(teacher.training)

    @property
    def sharded(self) -> bool:
        return self.shards is not None

    def mixer(self, layer: int, name: str) -> Block:
        """The mixer that stands for `name` in a layer; the teacher's own for full attention."""
        own = self.space.is_original(layer, name)
        return self.teacher.layers[layer].self_attn if own else self._mixers[layer, name]

    def layer(self, index: int, name: str) -> DecoderLayer:
        """A layer of a sub-network: the teacher's with the mixer `name`, or the finalised hybrid's own."""
        own = self.own.get((index, name))
        return own if own is not None else self.teacher.layers[index].with_mixer(self.mixer(index, name))

    def select(self, placement: Placement) -> Decoder:
        """The sub-network of a placement. It shares every weight with the supernet. Raises UserError if not legal."""
        placement = self.space.check(placement)
        decoder = self.teacher.with_mixers([self.mixer(i, name) for i, name in enumerate(placement)], placement)
        for i, name in enumerate(placement):
            if (i, name) in self.own:
                decoder.model.layers[i] = self.own[i, name]
        return decoder

    def mixers(self) -> Iterator[Block]:
        """Every alternative of every layer."""
        return iter(self._mixers.values())

    def trained(self) -> dict[str, Block]:
        """The mixers that training changes, by the name under which their weights are saved, e.g. `layers.3.J`."""
        return self._without(self.frozen)

    def closed_form(self) -> dict[str, Block]:
        """The mixers whose output projection is solved in closed form: the trained ones, and the kinds in `solved`."""
        return self._without([letter for letter in self.frozen if letter not in self.solved])

    def _without(self, letters: Collection[str]) -> dict[str, Block]:
        return {f"layers.{i}.{name}": mixer for (i, name), mixer in self._mixers.items() if not is_of(name, letters)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that is no longer the attention's, by the name under which it is saved."""
        trained = self.trained()
        return {
            f"{group}.{name}": parameter
            for group, mixer in self.closed_form().items()
            for name, parameter in mixer.named_parameters()
            if group in trained or name == out_name(mixer)
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes what was learnt, cast to the dtype that each parameter has. Raises UserError."""
        expected = self.trained_parameters()
        for name, parameter in expected.items():
            if name not in weights or weights[name].shape != parameter.shape:
                raise UserError(f"the supernet's weights lack {name} of shape {list(parameter.shape)}: distil again")
        for name, parameter in expected.items():
            assign(parameter, weights[name])

    @classmethod
    def load(
        cls,
        run: Run,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        loaded: LoadedModel | None = None,
    ) -> Supernet:
        """The newest supernet of a run, finished or not. Raises UserError when there is none or it is damaged.

        Args:
            loaded: the run's model where it has been read already, in its own dtype and on its own device.
        """
        saved = checkpoint.latest(run.supernet)
        if saved is None:
            raise UserError(f"{run.path} has no supernet yet: run `nasbench distill --out {run.path}` first")
        loaded = loaded or load_model(run.spec.model, dtype=dtype, device=device)
        frozen, solved = (tuple(saved.state.get(key, ())) for key in ("frozen", "solved"))
        net = cls(loaded, run.spec.space, frozen, run.spec.seed, solved=solved)
        if loaded.decoder.device.type != "meta":  # where another process has the weights
            net.load_weights(saved.weights(str(loaded.decoder.device)))
        for mixer in net.trained().values():
            mixer.requires_grad_(False)
        net.version = saved.version
        return net


def check_teacher(teacher: Decoder, space: Space) -> None:
    """Raises UserError unless the teacher's layers are attention, full or windowed, and the space's originals."""
    shape = teacher.shape
    linear = {name for i, name in enumerate(teacher.placement) if not shape.mixer(name, i).is_attention}
    if linear:
        raise UserError(
            f"{teacher.shape.name} cannot be a teacher: it is {format_placement(teacher.placement)}, and its layers "
            f"{', '.join(sorted(linear))} are no attention that others can start from"
        )
    if teacher.placement != space.original:
        raise UserError(
            f"{teacher.shape.name} is {format_placement(teacher.placement)}, the run's model was "
            f"{format_placement(space.original)}: choose another folder"
        )
