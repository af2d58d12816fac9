"""The model class for lm-evaluation-harness against the harness's own transformers backend: speed and differences.

    python benchmarks/harness.py [--out FILE.csv] [--dtypes bf16,fp32] [--batch 32]

Both read the same random weights of SmolLM2-135M's shape, with bytes as tokens, at the same batch. Needs the packages
lm_eval, accelerate and transformers, and no data. A difference in nats is the largest of all requests. Text counts as
equal up to where the first of both ends.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import parser_of, run
from nasbench.checkpoints.load import load_model
from nasbench.core.errors import MachineError
from nasbench.core.provenance import provenance, version_of
from nasbench.core.tables import write_table
from nasbench.devices import detect
from nasbench.model.shapes import DEFAULT_MODEL, MODELS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SETS = {
    "4 endings of 30 tokens, context 250": (128, 50, "", 0),
    "4 letters, context 250 behind 1500 tokens of examples": (64, 50, "ABCD", 300),
    "4 endings of 30 tokens, context 250 behind 1500 tokens of examples": (32, 50, "", 300),
}
"""Kind of request -> (questions, words of each, choices, words before all of them); a word is five tokens."""
TEXTS = "greedy text behind 200, 300 and 400 tokens"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of request in one dtype. `equal` is the share of equal greedy flags, or of equal texts' tokens."""

    requests: str
    count: int
    dtype: str
    batch: int
    hf_s: float
    nasbench_s: float
    ratio: float
    largest_difference_nats: float | None
    equal: float
    repeats: int
    device: str
    driver: str
    torch: str
    triton: str
    kernels: str
    transformers: str
    lm_eval: str
    measured_utc: str


def write_model(folder: Path, layers: int) -> Any:
    """Random weights of the default model's shape and a tokenizer of bytes; the tokenizer as transformers has it."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shape = MODELS[DEFAULT_MODEL]
    tokens = ["<e>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"t{i:05}" for i in range(len(tokens), shape.vocab_size)]  # no text has them, but the model writes them
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers or shape.num_layers, num_attention_heads=shape.num_heads, head_dim=shape.head_dim,
        num_key_value_heads=shape.num_kv_heads, max_position_embeddings=shape.max_context, rms_norm_eps=shape.rms_eps,
        rope_theta=shape.rope_theta, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(count))


def asked(*arguments: Any) -> Any:
    """A request as the harness makes it."""
    return SimpleNamespace(args=arguments)


def questions(draw: random.Random, count: int, size: int, choices: str, before: int) -> list[Any]:
    head = words(draw, before) + " " if before else ""
    contexts = [head + words(draw, size) for _ in range(count)]
    endings = [list(choices) or [words(draw, 6) for _ in range(4)] for _ in contexts]
    return [asked(context, f" {one}") for context, four in zip(contexts, endings, strict=True) for one in four]


def timed(work: Callable[[], Any], repeats: int, device: str) -> tuple[Any, float]:
    """(result, seconds of the fastest repeat)."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return found, min(took)


def equal_share(one: Sequence[str], other: Sequence[str]) -> float:
    """Characters of both texts before they first differ, by those of the shorter one."""
    same = total = 0
    for left, right in zip(one, other, strict=True):
        total += min(len(left), len(right))
        pairs = enumerate(zip(left, right, strict=False))
        same += next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))
    return same / max(total, 1)


def rows(theirs: Any, ours: Any, options: argparse.Namespace) -> Iterator[tuple[str, int, float, float, Any, float]]:
    """(requests, their number, seconds of both, largest difference, equal share)."""
    draw, device, repeats = random.Random(0), options.device, options.repeats
    for name, (count, *rest) in SETS.items():
        asks = questions(draw, max(1, count // options.shrink), *rest)
        for model in (theirs, ours):  # kernels are compiled, and memory is taken, before the clock runs
            model.loglikelihood(asks[: 2 * options.batch], disable_tqdm=True)
        wanted, hf_s = timed(lambda: theirs.loglikelihood(asks, disable_tqdm=True), repeats, device)  # noqa: B023
        found, own_s = timed(lambda: ours.loglikelihood(asks, disable_tqdm=True), repeats, device)  # noqa: B023
        worst = max(abs(a[0] - b[0]) for a, b in zip(wanted, found, strict=True))
        same = sum(a[1] == b[1] for a, b in zip(wanted, found, strict=True)) / len(asks)
        yield name, len(asks), hf_s, own_s, worst, same
    settings = {"until": ["~~"], "max_gen_toks": options.new_tokens, "do_sample": False}
    asks = [asked(words(draw, 40 + 20 * (i % 3)), settings) for i in range(options.batch)]
    ours.generate_until(asks)
    wanted, hf_s = timed(lambda: theirs.generate_until(asks, disable_tqdm=True), 1, device)
    found, own_s = timed(lambda: ours.generate_until(asks, disable_tqdm=True), repeats, device)
    yield TEXTS, len(asks), hf_s, own_s, None, equal_share(wanted, found)


def work(options: argparse.Namespace) -> int:
    try:
        import transformers
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MachineError(f"{error}: pip install lm_eval accelerate transformers") from None
    from nasbench.evaluation.harness_model import HarnessModel

    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    info = detect(options.device)
    told = provenance(info.slug, info.driver)
    cells = told.cells("device", "driver", "torch", "triton", "kernels", "measured_utc")
    cells |= {name: version_of(name) for name in ("transformers", "lm_eval")}
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        tokenizer = write_model(Path(name), options.layers)
        for dtype in options.dtypes.split(","):
            kind = DTYPES[dtype]
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=kind).to(options.device).eval()
            batch = options.batch
            loaded = load_model(name, dtype=kind, device=options.device)
            longest = loaded.shape.max_context
            theirs = HFLM(model, tokenizer=tokenizer, batch_size=batch, max_length=longest, device=options.device)
            ours = HarnessModel(loaded.decoder, loaded.tokenizer, batch_size=batch)
            for requests, count, hf_s, own_s, worst, same in rows(theirs, ours, options):
                row = Row(
                    requests=requests, count=count, dtype=dtype, batch=batch, hf_s=hf_s, nasbench_s=own_s,
                    ratio=hf_s / own_s, largest_difference_nats=worst, equal=same, repeats=options.repeats, **cells,
                )  # fmt: skip
                found.append(row)
                shown = "" if worst is None else f", {worst:.1e} nats"
                print(
                    f"{dtype} {requests}: {hf_s:.2f} s, {own_s:.2f} s, {row.ratio:.2f}x{shown}, {same:.3f}", flush=True
                )
                if options.out:
                    write_table(options.out, found, Row)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--batch", type=int, default=32, help="requests of one forward of both")
    parser.add_argument("--repeats", type=int, default=2, help="of each measurement; the fastest counts")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0 for the shape's own")
    parser.add_argument("--shrink", type=int, default=1, help="divides the numbers of requests")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each text")
    return run(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
