"""Tasks of lm-evaluation-harness by their names there: `mmlu`, `gsm8k`, `arc_easy`, or of a folder of YAML files.

    NAME                  all items, as many examples before each as the task says
    NAME@200              the first 200 items of each subtask
    NAME:5                5 examples before each item
    NAME:FOLDER, NAME:5:FOLDER    a task of a YAML file in that folder

A group, as `mmlu`, scores the items of all its subtasks together. The first measure of which more is better is the
task's; others stand beside it as `NAME.acc_norm`. Perplexities are kept as nats an item's word, byte or text.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from nasbench.core.errors import MachineError, NasbenchError, UserError, unknown
from nasbench.core.sizes import is_count
from nasbench.evaluation.scores import Scores
from nasbench.evaluation.suite import encode_prompts
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

INSTALL = "tasks of lm-evaluation-harness need it: pip install 'nasbench[eval]'"
SEED = 1234
"""Of the choice of examples, the harness's own."""


@dataclass
class Loaded:
    """A task with its data.

    Attributes:
        subtasks: the harness's objects by name.
        about: versions and settings, as each score keeps them.
        digest: of the items and the way they are asked.
        measured: by title, the harness's metric with a hash of each item, and whether more is better.
    """

    subtasks: dict[str, Any]
    about: dict[str, Any]
    digest: str
    measured: dict[str, tuple[dict[str, Any], bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class HarnessTask(Task):
    """A task or a group of tasks of the harness.

    Attributes:
        task: its name there.
        limit: items of each subtask, 0 for all.
        shots: examples before each item, None for the task's own number.
        folder: of YAML files that define the task, "" for the harness's own.
    """

    task: str
    limit: int = 0
    shots: int | None = None
    folder: str = ""
    name: ClassVar[str] = "harness"

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        raise UserError("write a task's own name, as arc_easy or arc_easy@200:5")

    @classmethod
    def of(cls, name: str, length: str, argument: str) -> Self:
        """From `NAME@LENGTH:ARGUMENT`. Raises UserError for a name that neither nasbench nor the harness has, and
        MachineError without the harness."""
        shots, _, folder = argument.partition(":") if is_count(argument.partition(":")[0]) else ("", "", argument)
        error = unknown("task", name, TASKS)
        if not name or difflib.get_close_matches(name, list(TASKS), n=1, cutoff=0.75):
            raise error
        if folder and not os.path.isdir(folder):
            raise UserError(f"task {name}: no such folder of task files: {folder}")
        try:
            known = manager(folder).task_index
        except ImportError:
            raise UserError(f"{error}; {INSTALL}") from None
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, list(known), n=3)) or "no near name"
            raise UserError(f"{error}; or a task of lm-evaluation-harness {folder and f'in {folder} '}({near})")
        return cls(name, parse_length(name, length, 0), int(shots) if shots else None, folder)

    @property
    def title(self) -> str:
        limit, shots = f"@{self.limit}" if self.limit else "", "" if self.shots is None else f":{self.shots}"
        return f"{self.task}{limit}{shots}"

    @property
    def label(self) -> str:
        return self.title + (f":{self.folder}" if self.folder else "")

    def settings(self, context: Context) -> str:
        return f"lm-eval-{version('lm_eval')}/{self._loaded(context).digest}"

    def scored_tokens(self, context: Context) -> int:
        """Of the longest request, as its texts have."""
        tasks = self._loaded(context).subtasks.values()

        def longest() -> int:
            with _in_one_line(f"task {self.label}"):
                for task in tasks:
                    task.set_fewshot_seed(SEED)
                    task.build_all_requests(limit=self.limit or None)
            texts = ["".join(text for text in i.args if isinstance(text, str)) for t in tasks for i in t.instances]
            new = max(int((task.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)) for task in tasks)
            return new + max(map(len, encode_prompts(context.tokenizer, sorted(texts, key=len)[-20:])))

        return context.once((self, "longest"), longest)

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        import lm_eval

        from nasbench.evaluation.harness_model import HarnessModel

        loaded = self._loaded(context)
        for subtask in loaded.subtasks.values():
            subtask.set_fewshot_seed(SEED)
        random.seed(0)
        np.random.seed(SEED)
        model = HarnessModel(decoder, context.tokenizer)
        with _in_one_line(f"task {self.label}"):
            found = lm_eval.evaluate(
                model, {"tasks": loaded.subtasks, "groups": {}}, limit=self.limit or None, bootstrap_iters=0
            )
        return self._samples(found["samples"], found["higher_is_better"], loaded)

    def _samples(self, found: dict[str, list[dict[str, Any]]], better: Any, loaded: Loaded) -> dict[str, Tensor]:
        values: dict[tuple[str, str], list[float]] = {}
        documents: dict[tuple[str, str], list[str]] = {}
        for items in found.values():
            for item in items:
                for metric in item["metrics"]:
                    number = _number(metric, item[metric])
                    if number is not None:
                        values.setdefault((metric, item["filter"]), []).append(number)
                        documents.setdefault((metric, item["filter"]), []).append(item["doc_hash"][:8])
        if not values:
            raise MachineError(f"task {self.label} has no measure that is a number for each item")
        rising = {metric for metrics in better.values() for metric, more in metrics.items() if more}
        first = next((key for key in values if key[0] in rising), next(iter(values)))
        titles = {
            key: self.title if key == first else f"{self.title}.{key[0]}" + ("" if key[1] == "none" else f",{key[1]}")
            for key in values
        }
        for key, title in titles.items():
            loaded.measured[title] = {"metric": ",".join(key), "items": documents[key]}, key[0] in rising
        return {titles[key]: torch.tensor(numbers, dtype=torch.float64) for key, numbers in values.items()}

    def scores(self, samples: Tensor, title: str = "", context: Context | None = None, device: object = "") -> Scores:
        found = super().scores(samples, title, context, device)
        if context is None:
            return found
        loaded = self._loaded(context)
        about, rising = loaded.measured[title]
        metric = "nats" if _is_perplexity(about["metric"]) else self.metric if rising else about["metric"]
        return replace(found, metric=metric, higher_is_better=rising, about={**found.about, **loaded.about, **about})

    def _loaded(self, context: Context) -> Loaded:
        return context.once(self, self._load)

    def _load(self) -> Loaded:
        with _in_one_line(f"task {self.label}"):
            subtasks = manager(self.folder).load([self.task])["tasks"]
            digest = hashlib.sha256()
            for name, subtask in subtasks.items():
                own = subtask.get_config("num_fewshot")
                # As the harness has it: what a task forbids stays forbidden.
                shots = own or 0 if self.shots is None or own == 0 else self.shots
                subtask.set_config(key="num_fewshot", value=shots)
                settings = {key: repr(value) for key, value in subtask.dump_config().items() if key != "dataset_kwargs"}
                digest.update(json.dumps([name, settings], sort_keys=True).encode())
                for _, document in subtask.doc_iterator(limit=self.limit or None):
                    digest.update(json.dumps(document, sort_keys=True, default=repr).encode())
        versions = {name: subtask.VERSION for name, subtask in subtasks.items()}
        shots = {name: subtask.get_config("num_fewshot") for name, subtask in subtasks.items()}
        about = {"lm_eval": version("lm_eval"), "task_versions": versions, "num_fewshot": shots, "limit": self.limit}
        return Loaded(subtasks, about, digest.hexdigest()[:16])


def _is_perplexity(metric: str) -> bool:
    return metric.partition(",")[0].endswith(("perplexity", "bits_per_byte"))


def _number(metric: str, value: Any) -> float | None:
    """One number of an item, None where it has none. Of a perplexity: nats, by the item's own words or bytes."""
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return -float(value[0]) / float(value[1])
    if not isinstance(value, (bool, int, float, np.number)):
        return None
    return -float(value) if _is_perplexity(metric) else float(value)


@cache
def manager(folder: str = "") -> TaskManager:
    """The harness's index of tasks: its own, which takes seconds to read, or those of a folder. Raises ImportError."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None, include_defaults=not folder)


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """What fails inside the harness: mostly data that a hub does not give, or a task file that is wrong."""
    try:
        yield
    except (NasbenchError, torch.OutOfMemoryError, AssertionError):
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise MachineError(f"{what}: lm-evaluation-harness fails: {type(error).__name__}: {reason[:300]}") from error
