"""What the cost model is judged at: random placements, contexts and batches, none of which a calibration has seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement, count_kind

BATCHES = (1, 2, 3, 4, 8, 16, 24, 32, 64, 100, 128, 256, 384, 512, 1024)
MIXES = ("J", "JW", "JG", "JWG", "G", "WG", "JJJW", "W")
"""What stands beside full attention in a placement, drawn letter by letter."""
MOST_BATCH = BATCHES[-1]


@dataclass(frozen=True)
class JudgePoint:
    """One point: mode, placement, context and batch."""

    mode: str
    placement: Placement
    context: int
    batch: int


def placements(shape: ModelSpec, names: str, count: int, generator: random.Random) -> list[Placement]:
    """The published placement, then random ones whose layers of full attention go from none to all and round again."""
    layers = shape.num_layers
    steps = sorted({round(layers * share) for share in (0, 0.04, 0.07, 0.11, 0.18, 0.25, 0.36, 0.5, 0.64, 0.82, 1)})
    generator.shuffle(steps)
    mixes = [mix for mix in MIXES if set(mix) <= set(names)] or [names.replace("A", "") or names]
    found = [shape.placement]
    while len(found) < count:
        full = set(generator.sample(range(layers), steps[len(found) % len(steps)]))
        mix = generator.choice(mixes)
        found.append(tuple("A" if i in full else generator.choice(mix) for i in range(layers)))
    return found


def judge_points(
    shape: ModelSpec,
    names: str,
    mode: str,
    contexts: Sequence[int],
    count: int,
    largest: Callable[[Placement, int], int],
    prompt_tokens: int,
    seed: int = 0,
) -> list[JudgePoint]:
    """`count` points over placements, contexts and batches; any beginning of the list covers all three.

    Args:
        largest: the most sequences of a placement at a context.
        prompt_tokens: of all prompts of a prefill point together.
    """
    generator = random.Random(f"{seed} {mode}")
    found: list[JudgePoint] = []
    for i, placement in enumerate(placements(shape, names, count, generator)):
        context = contexts[(3 * i + i // len(contexts)) % len(contexts)]
        most = max(1, largest(placement, context))
        if mode == "prefill":
            # Full attention over the longest prompts takes tens of seconds on any device.
            wide = count_kind(placement, "A") > shape.num_layers // 3
            context = min(context, prompt_tokens if wide else 2 * prompt_tokens)
            # Now and then as many short prompts as the largest profiled batch.
            most = min(most, max(1, (1 if i % 8 else 2) * prompt_tokens // context))
        sizes = sorted({size for size in BATCHES if size < most} | {most})
        share = (i * 0.618) % 1 if i % 4 else 1.0
        found.append(JudgePoint(mode, placement, context, sizes[min(len(sizes) - 1, int(share * len(sizes)))]))
    return list(dict.fromkeys(found))
