"""What the transfer of the attention's weights and real text are worth: one supernet each with and without them.

    python benchmarks/ablations.py measure --out DIR --data text.jsonl [--align 2M] [--supernet 2M] [--self-tokens 1M]
    python benchmarks/ablations.py report --out DIR

Arms, trained with the same seed and the same tokens of alignment and of random sub-networks:

    base         mixers start from the attention's weights; real text
    no-transfer  every mixer starts random; real text
    self         as base, on text that the model wrote itself (nasbench corpus generate), read again as often as needed

After each stage fixed placements are measured on the same held-out real text: loss and KL to the model, row by row, so
that arms are compared row by row too. Each stage's values are in DIR/items.jsonl at once; stopped, the same command
continues, and what is measured is not measured again. Weights, in DIR/work, go once their arm is measured.

`report` writes DIR/ablations.csv, differences.csv and README.md from those values, on any machine; `measure` ends so.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ablation_tables import ARMS, STAGES, TEACHER, Results
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import NasbenchError, UserError, unknown
from nasbench.core.sizes import parse_size
from nasbench.reproduce.items import Items, Subject
from nasbench.reproduce.recipe import Plan, Recipe
from nasbench.spaces.placement import Placement, format_placement, uniform_placement


def parse_arms(text: str) -> list[str]:
    """`base,self` -> the arms, in the order of ARMS. Raises UserError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ARMS:
            raise unknown("arm", name, ARMS)
    if not names:
        raise UserError(f"no arm in {text!r}: choose from {', '.join(ARMS)}")
    return [name for name in ARMS if name in names]


def placements(names: Sequence[str], layers: int, full_attention: int) -> dict[str, Placement]:
    """What is measured, by its label: every kind in all layers, and around evenly spread full attention. Raises
    UserError."""
    if not 0 < full_attention < layers:
        raise UserError(f"bad --full-attention {full_attention}: choose 1 to {layers - 1}")
    fillers = [name for name in names if name != "A"]
    found = {f"all {filler}": (filler,) * layers for filler in fillers}
    even = {f"{full_attention} A, {filler}": uniform_placement(layers, full_attention, filler) for filler in fillers}
    return {**found, **even}


class Study:
    """The arms of a folder.

    Raises UserError when the folder was measured with other options, MachineError for what the machine refuses.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from nasbench.cli.common import log, torch_device, torch_dtype
        from nasbench.cli.distill_command import parse_names
        from nasbench.cli.reproduce_command import scaled
        from nasbench.devices import detect
        from nasbench.supernet.settings import DistillConfig

        if options.dtype == "fp16":
            raise UserError("dtype fp16 cannot train (its range is too small): choose fp32 or bf16")
        self.out, self.log = options.out, log
        self.device, self.dtype = torch_device(options.device), torch_dtype(options.dtype)
        self.info = detect(self.device)
        self.arms = parse_arms(options.arms)
        shape = resolve_shape(options.model)
        self.names = parse_names(options.names, shape)
        self.placements = placements(self.names, shape.num_layers, options.full_attention)
        self.sequence = parse_size(options.sequence)
        if self.sequence > shape.max_context:
            raise UserError(f"sequence {self.sequence} is beyond the context of {shape.name}, {shape.max_context}")
        settings = DistillConfig.read(options.config) if options.config else scaled(Recipe().training, self.device)
        budgets = {"align": _tokens(options.align), "supernet": _tokens(options.supernet)}
        self.config = settings.updated({f"{stage}_tokens": tokens for stage, tokens in budgets.items()})
        self.stages = [stage for stage in STAGES if stage == "align" or budgets[stage]]
        for stage, tokens in budgets.items():
            if tokens and not self.trained(stage):
                step = self._step_tokens(stage)
                raise UserError(f"bad --{stage} {tokens}: a step has {step} tokens; give more, or a --config")
        self.model, self.shape, self.seed = options.model, shape, options.seed
        self.data = str(Path(options.data).resolve()) if options.data and Path(options.data).exists() else options.data
        self.test_tokens, self.self_tokens = parse_size(options.test_tokens), parse_size(options.self_tokens)
        self.length = min(parse_size(options.length), shape.max_context)
        self.plan, self.items = Plan(self.out / "plan.json"), Items(self.out / "items.jsonl")
        self.command = options.command
        self.asked = {
            "model": self.model, "names": list(self.names), "data": self.data, "sequence": self.sequence,
            "seed": self.seed, "full_attention": options.full_attention, "self_tokens": self.self_tokens,
            "length": self.length, "test_tokens": self.test_tokens, "device": self.info.slug, "dtype": options.dtype,
            "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items()},
        }  # fmt: skip
        self._check()

    def _check(self) -> None:
        """Everything but the arms must be as it was when the folder was begun."""
        known = self.plan["asked"] or self.asked
        changed = [key for key in self.asked if key != "settings" and known.get(key) != self.asked[key]]
        settings = known["settings"]
        changed += [key for key, value in self.asked["settings"].items() if settings.get(key) != value]
        if changed:
            raise UserError(f"{self.out} was begun with another {', '.join(changed)}: choose another folder")

    def _begin(self) -> None:
        """Reads model and text, and then writes down what is asked: a wrong path binds nobody."""
        from nasbench.checkpoints.load import load_model

        self.loaded = load_model(self.model, dtype=self.dtype, device=self.device)
        self.real = self._read(self.data)
        self.plan["asked"], self.plan["source"] = self.asked, self.loaded.source
        self.plan["placements"] = {label: format_placement(p) for label, p in self.placements.items()}
        self.plan["commands"] = list(dict.fromkeys([*(self.plan["commands"] or []), self.command]))

    def _step_tokens(self, stage: str) -> int:
        return max(1, getattr(self.config, f"{stage}_batch_tokens") // self.sequence) * self.sequence

    def trained(self, stage: str) -> int:
        """Tokens of whole steps that a stage trains on."""
        step = self._step_tokens(stage)
        return getattr(self.config, f"{stage}_tokens") // step * step

    @contextmanager
    def _timed(self, key: str) -> Iterator[None]:
        """Adds the time inside to the plan's, over all runs of the command."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.plan["seconds"] or {}
            self.plan["seconds"] = {**seconds, key: round(seconds.get(key, 0.0) + time.monotonic() - began, 2)}

    def missing(self) -> list[str]:
        """Arms of which a stage is not measured yet."""
        done = self.plan["stages"] or {}
        return [arm for arm in self.arms if any(f"{arm}:{stage}" not in done for stage in self.stages)]

    def run(self) -> None:
        """Trains and measures what is missing."""
        if not self.missing():
            self.log("every arm is measured")
            return
        self._begin()
        for arm in self.missing():
            self._arm(arm)
            Results(self.out).write()

    def _read(self, data: str) -> Any:
        from nasbench.data.packing import Corpus

        corpus = Corpus.load(data, self.loaded.tokenizer, self.sequence)
        return corpus if self.config.documents else corpus.without_documents()

    def _own_text(self) -> Path:
        """What the model wrote; written once."""
        from nasbench.cli.common import progress_bar
        from nasbench.data.self_corpus import BATCH, Writing, write_corpus

        path = self.out / "work" / "self.jsonl"
        if not path.is_file():
            writing = Writing(self.model, self.length, BATCH[self.device.split(":")[0]], seed=self.seed)
            with self._timed("writing"), progress_bar() as progress:
                write_corpus(self.loaded, writing, self.self_tokens, path, progress)
        counts = [json.loads(line)["tokens"] for line in path.read_text(encoding="utf-8").splitlines()]
        self.plan["written"] = {"tokens": sum(counts), "documents": len(counts)}
        seconds = self.plan["seconds"]["writing"]
        self.log(f"{len(counts)} documents, {sum(counts):,} tokens written: {sum(counts) / seconds:,.0f} tokens/s")
        return path

    def _text(self, arm: str) -> tuple[str, Any]:
        """(name of the text, its rows) that an arm trains on. Of the model's own text nothing is held out: arms are
        measured on real text."""
        if not ARMS[arm].own_text:
            return self.data, self.real
        import torch

        from nasbench.data.packing import SPLITS, Corpus

        path = self._own_text()
        own = self._read(str(path))
        train = torch.cat([getattr(own, split) for split in SPLITS])
        ages = {"train": torch.cat([own.ages[split] for split in SPLITS])} if own.ages else {}
        return str(path), Corpus(train, own.search, own.test, own.fingerprint, {**own.ages, **ages})

    def _arm(self, arm: str) -> None:
        from nasbench.cli.common import progress_bar
        from nasbench.runs import Run, RunSpec
        from nasbench.supernet import checkpoint
        from nasbench.supernet.train import distill

        data, corpus = self._text(arm)
        spec = RunSpec(self.model, self.names, self.shape.num_layers, data, self.sequence, self.seed)
        run = Run.create(self.out / "work" / arm, spec)
        for stage in self.stages:
            key = f"{arm}:{stage}"
            if key in (self.plan["stages"] or {}):
                continue
            changes = {"transfer": ARMS[arm].transfer} | ({"supernet_tokens": 0} if stage == "align" else {})
            with self._timed(key), progress_bar() as progress:
                net = distill(
                    run, self.config.updated(changes), device=self.device, dtype=self.dtype, progress=progress,
                    notice=self.log, loaded=self.loaded, corpus=corpus,
                )  # fmt: skip
            self._measure(run, net, key, corpus.train.numel())
            del net
            self._forget()
        checkpoint.discard(run.supernet)

    def _measure(self, run: Any, net: Any, key: str, text_tokens: int) -> None:
        """Loss and KL of the placements on the real text's split `test`; into items.jsonl and the plan."""
        import torch

        from nasbench import __version__
        from nasbench.evaluation.evaluator import Evaluator

        began = time.monotonic()
        teacher = Subject(format_placement(net.space.original), TEACHER)
        wanted = [*self.placements.values()]
        if self.items.get(teacher, "loss") is None:
            wanted.append(net.space.original)
        found = Evaluator(run, net, self.real, test_tokens=self.test_tokens).held_out(wanted, "test")
        for placement, (loss, kl) in found.items():
            subject = teacher if placement == net.space.original else Subject(format_placement(placement), key)
            self.items.add(subject, net.version, {"loss": loss.numpy(), "kl": kl.numpy()})
        stage = key.partition(":")[2]
        stages = list(STAGES)[: list(STAGES).index(stage) + 1]
        row = {
            "tokens": sum(self.trained(name) for name in stages), "text_tokens": text_tokens,
            "torch": torch.__version__, "driver": self.info.driver, "nasbench": __version__,
            "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }  # fmt: skip
        self.plan["stages"] = {**(self.plan["stages"] or {}), key: row}
        seconds = self.plan["seconds"][key]
        self.log(f"{key}: trained in {seconds:.1f} s, measured in {time.monotonic() - began:.1f} s")

    def _forget(self) -> None:
        """Gives memory back that captured graphs and their tensors held."""
        import torch

        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _tokens(text: str) -> int:
    """A size, or 0."""
    return 0 if text.strip() == "0" else parse_size(text)


def measure(options: argparse.Namespace) -> int:
    """Trains and measures what is missing, and writes the tables after every arm that is there."""
    study = Study(options)
    study.run()
    return report(options)


def report(options: argparse.Namespace) -> int:
    """Writes the tables and prints the page."""
    print(Results(options.out).write())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the values, tables and README.md")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"which are trained, of {', '.join(ARMS)}")
    parser.add_argument("--model", default="default")
    parser.add_argument("--names", default="A,W256,J", help="kinds that every layer may choose from")
    parser.add_argument("--data", default="", help="real text, as for nasbench distill; default: Python's help")
    parser.add_argument("--align", default="2M", help="tokens of alignment of every arm; 0: none")
    parser.add_argument("--supernet", default="2M", help="tokens of random sub-networks of every arm; 0: none")
    parser.add_argument("--self-tokens", default="1M", help="tokens that the model writes itself")
    parser.add_argument("--length", default="1k", help="most tokens of a document that it writes")
    parser.add_argument("--test-tokens", default="256k", help="held-out tokens that every placement is measured on")
    parser.add_argument("--full-attention", "-k", type=int, default=4, help="layers of full attention where some stay")
    parser.add_argument("--sequence", default="2k")
    parser.add_argument("--config", type=Path, help="TOML file with settings of the training, as for nasbench distill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "benchmarks/ablations.py", *words])
    try:
        return {"measure": measure, "report": report}[options.what](options)
    except NasbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
