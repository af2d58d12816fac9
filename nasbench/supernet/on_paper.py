"""What training takes on cards that are not here: memory by formula, speed by measured rates.

A card keeps `DistillConfig`'s step for itself: n cards together take n times its tokens. Memory is the worst moment of
a step: every layer its largest alternative, nothing read yet by the backward pass. `BlockSpec.kept_bytes` counts what
blocks keep. Speed is the FLOPs of the mean sub-network over the rate that steps reached (`RATES`), plus the time of
sums and gathers over the slowest link, none of it hidden behind products: a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nasbench.core.errors import unknown
from nasbench.devices import DEVICES
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement, is_of
from nasbench.spaces.space import Space
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.steps import sample_placement

RATES = {
    "nvidia-h200": {
        576: {"align": 176.0, "supernet": 197.0, "recompute": 164.0},
        1536: {"align": 340.0, "supernet": 490.0, "recompute": 409.0},
    }
}
"""10^12 operations a second of a step, by device and hidden size: reports/training-h200. "recompute" of the small model
is not measured: as much slower as the large one's."""
NODE_CARDS = 8
LINK_GB_S = {"node": 152.0, "network": 50.0}
"""10^9 bytes a second that a sum over cards moves on each: measured on two H200s of one host (21 ms for the gradients
of 799 million parameters in fp32); between hosts 400 Gbit/s a card, not measured."""
SAMPLES = 64
"""Steps whose sub-networks' FLOPs are averaged."""
SHARD_SHARES = 3
"""Of a gathered unit: the gathered shards, the weights made of them, and the next unit's shards."""


@dataclass(frozen=True)
class PaperStage:
    """One stage on so many cards.

    Attributes:
        tokens, step_tokens: of all cards.
        memory_bytes: of each card.
        tok_s: of all cards.
    """

    cards: int
    stage: str
    tokens: int
    step_tokens: int
    memory_bytes: int
    tok_s: float

    @property
    def hours(self) -> float:
        return self.tokens / self.tok_s / 3600


@dataclass(frozen=True)
class Paper:
    """A training on paper.

    Attributes:
        device: slug of the cards.
        card_bytes: memory of a card.
        notes: which rates were not measured.
    """

    device: str
    card_bytes: int
    stages: tuple[PaperStage, ...]
    notes: tuple[str, ...]


class Sums:
    """The parts of a training's memory and FLOPs.

    Args:
        space: what every layer may be.
        dtype_bytes: of weights and activations.
        cards: that share the weights where `config.shard` is set.
    """

    def __init__(
        self, shape: ModelSpec, space: Space, config: DistillConfig, sequence: int, dtype_bytes: int = 2, cards: int = 1
    ) -> None:
        self.shape, self.space, self.config, self.cards = shape, space, config, cards
        self.sequence, self.width, self.share = sequence, dtype_bytes, 1 / cards if config.shard else 1.0
        layers = [[shape.mixer(name, i) for name in space.alternatives(i)] for i in range(space.num_layers)]
        self.alternatives = [[(spec, not is_of(spec.kind, config.frozen)) for spec in specs] for specs in layers]
        pairs = [pair for layer in self.alternatives for pair in layer]
        self.trained = sum(spec.parameters() for spec, learns in pairs if learns)
        self.frozen = shape.parameters() + sum(spec.parameters() for spec, learns in pairs if not learns)

    def rows(self, stage: str) -> int:
        """Sequences of a card's step."""
        return max(1, int(getattr(self.config, f"{stage}_batch_tokens")) // self.sequence)

    def state_bytes(self) -> int:
        """Weights, masters, gradients and moments of a card; where they are sharded also what one unit takes while it
        is whole, and the head, which stays so through a step."""
        rounded = 0 if self.config.shard else self.width
        held = self.share * (self.width * self.frozen + (16 + rounded) * self.trained)
        if self.config.shard:
            ffn = max(spec.parameters() for spec in self.shape.ffns())
            mixer = max(spec.parameters() for layer in self.alternatives for spec, _ in layer)
            held += self.width * (SHARD_SHARES * max(ffn, mixer) + self.shape.hidden_size * self.shape.vocab_size)
        return int(held)

    def memory_bytes(self, stage: str) -> int:
        """The most that a card holds in a step."""
        shape, width, tokens = self.shape, self.width, self.rows(stage) * self.sequence
        row = shape.hidden_size * width * tokens
        mixers = [max(s.kept_bytes(tokens, width, learns) for s, learns in layer) for layer in self.alternatives]
        ffns = [spec.kept_bytes(tokens, width, False) for spec in shape.ffns()]
        # Sums in fp32 of sharded gradients, or gradients as the backward pass leaves them.
        ends = int(self.share * self.trained * (4 if self.config.shard else width))
        if stage == "align":
            return self.state_bytes() + max(2 * max(mixers), 3 * max(ffns) // 2) + 3 * row + ends
        norms = 2 * (row + 4 * tokens)  # their inputs, and a figure a token
        layers = [mixer + ffn + norms for mixer, ffn in zip(mixers, ffns, strict=True)]
        # In the backward pass of a gated FFN: gradients of its product, of gate and up.
        last = 3 * max(ffns) // 2 + 2 * row
        logits = 2 * min(self.config.kl_chunk, tokens) * shape.vocab_size * width
        kept, inputs = sum(layers), len(layers) * row
        peak = max(kept + max(last, logits), ends)
        if self.config.recompute:
            peak = max(inputs + logits, max(inputs, ends) + max(layers) + last)
        return self.state_bytes() + 5 * row + peak

    def flops(self, stage: str) -> float:
        """Of a card's mean step."""
        trained = [name for name in self.space.names if not is_of(name, ("A", *self.config.frozen))]
        rows = self.rows(stage)
        if stage == "align":
            return step_flops(self.shape, rows, self.sequence, trained)
        drawn = [sample_placement(self.space, self.config, 0, i, i / SAMPLES) for i in range(SAMPLES)]
        return sum(step_flops(self.shape, rows, self.sequence, trained, [each]) for each in drawn) / SAMPLES

    def moved_bytes(self, stage: str) -> float:
        """What a card sends in a step, for sums of gradients and, sharded, to gather weights: in alignment once, in
        sub-networks for teacher, student and the backward pass."""
        summed = 2 * 4 * self.trained
        if self.config.shard:
            passes = 1 if stage == "align" else 4 if self.config.recompute else 3
            summed = 4 * self.trained + passes * self.width * (self.frozen + self.trained)
        return summed * (self.cards - 1) / self.cards


def on_paper(
    shape: ModelSpec,
    space: Space,
    config: DistillConfig,
    sequence: int,
    device: str,
    cards: Sequence[int],
    seconds: dict[str, float] | None = None,
    dtype_bytes: int = 2,
) -> Paper:
    """Alignment and sub-networks on each number of cards.

    Args:
        device: slug of a known device.
        seconds: by stage, in place of tokens where above 0.

    Raises UserError for another device.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    known, notes = RATES.get(device), []
    if known is None:
        known = RATES["nvidia-h200"]
        notes.append(f"no training was measured on {device}: rates are an H200's, by the data sheets' products")
    scale = 1.0 if device in RATES else DEVICES[device].tflop_s / DEVICES["nvidia-h200"].tflop_s
    hidden = min(known, key=lambda size: abs(size - shape.hidden_size))
    if shape.hidden_size != hidden:
        notes.append(f"rates were measured at a hidden size of {hidden}")
    if shape.ffn:
        notes.append("no training was measured with such FFNs: rates are a gated FFN's")
    found = []
    for count in cards:
        sums = Sums(shape, space, config, sequence, dtype_bytes, count)
        link = "node" if count <= NODE_CARDS else "network"
        for stage in ("align", "supernet"):
            kind = "recompute" if stage == "supernet" and config.recompute else stage
            step_s = sums.flops(stage) / (scale * known[hidden][kind] * 1e12)
            step_s += sums.moved_bytes(stage) / LINK_GB_S[link] / 1e9
            step = count * sums.rows(stage) * sequence
            wanted = (seconds or {}).get(stage, 0.0)
            tokens = int(wanted * step / step_s) if wanted else getattr(config, f"{stage}_tokens")
            found.append(PaperStage(count, stage, tokens, step, sums.memory_bytes(stage), step / step_s))
    if max(cards) > 2:
        notes.append("more than 2 cards were not measured: sums and gathers at the rate of two, none of it hidden")
    if max(cards) > NODE_CARDS:
        notes.append(f"between hosts of {NODE_CARDS} cards by the data sheet: {LINK_GB_S['network']:.0f} GB/s a card")
    return Paper(device, DEVICES[device].memory_bytes, tuple(found), tuple(notes))


def step_flops(
    shape: ModelSpec, rows: int, sequence: int, trained: Sequence[str], placements: Sequence[Placement] | None = None
) -> float:
    """FLOPs of a supernet step of these placements; without placements, of an alignment step: of each trained mixer
    the forward pass, the gradients of its weights, and those between its projections. Its input needs none."""

    def mixer(name: str) -> tuple[float, float]:
        """(forward FLOPs of a layer's mixer, of its projections alone)."""
        spec = shape.mixer(name)
        return rows * spec.flops(sequence, 0), 2.0 * rows * sequence * spec.parameters()

    ffns = [rows * spec.flops(sequence, 0) for spec in shape.ffns()]
    head = 2.0 * rows * sequence * shape.hidden_size * shape.vocab_size
    total = shape.num_layers * mixer("A")[0] + sum(ffns)
    if placements is None:
        return total + shape.num_layers * sum(3 * forward - projections for forward, projections in map(mixer, trained))
    for placement in placements:
        total += 3 * head
        first = next((i for i, name in enumerate(placement) if not is_of(name, "A")), len(placement))
        for name, ffn in zip(placement[first:], ffns[first:], strict=True):
            forward, projections = mixer(name)
            total += 2 * (forward + ffn) + (projections if name in trained else 0)
    return total
