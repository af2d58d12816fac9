"""What a recurrent state in bf16 costs in precision: decode steps beside the same steps with a state in fp32.

    python benchmarks/state_dtype.py [--args 12x96x256] [--steps 4096] [--half-lives 8,64,512,4096]

Steps of the gated delta rule on random unit keys and queries and normal values, beta uniform, the decay such that the
memory has halved after so many tokens. Everything but the state is fp32, so the error is the state's rounding alone. It
is shown over the last tenth of the steps to each column: relative RMSE of the outputs and of the state.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from nasbench_kernels.gated_delta import gated_delta_step

COLUMNS = (64, 256, 1024, 4096)


@torch.inference_mode()
def errors(
    heads: int, key_dim: int, value_dim: int, steps: int, half_life: float, seed: int
) -> list[tuple[float, float]]:
    """(relative RMSE of the outputs over the last tenth of the steps, of the state) at every column up to `steps`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    states = [torch.zeros(1, heads, key_dim, value_dim, dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    decay = torch.full((1, heads), -math.log(2) / half_life)
    sums: list[tuple[float, float]] = []
    found = []
    for step in range(1, steps + 1):
        q, k = (F.normalize(normal(1, heads, key_dim), dim=-1) for _ in range(2))
        v, beta = normal(1, heads, value_dim), torch.rand(1, heads, generator=generator)
        wide, narrow = (gated_delta_step(q, k, v, decay, beta, state) for state in states)
        sums.append((float((narrow - wide).square().sum()), float(wide.square().sum())))
        if step in COLUMNS:
            last = sums[-max(1, step // 10) :]
            output = math.sqrt(sum(error for error, _ in last) / sum(size for _, size in last))
            state = float((states[1].float() - states[0]).norm() / states[0].norm())
            found.append((output, state))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--args", default="12x96x256", help="heads x key dimension x value dimension")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--half-lives", default="8,64,512,4096", help="tokens after which a memory has halved")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sizes = [int(part) for part in options.args.split("x")]
    columns = [column for column in COLUMNS if column <= options.steps]
    print("half-life  " + "".join(f"{f'{column} steps':>20s}" for column in columns))
    for half_life in map(float, options.half_lives.split(",")):
        row = errors(*sizes, columns[-1], half_life, options.seed)
        print(f"{half_life:9.0f}  " + "".join(f"{output:12.1e} {state:7.1e}" for output, state in row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
