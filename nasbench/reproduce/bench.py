"""What all stages of a reproduction share: recipe, run, model and text, read once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nasbench.checkpoints.load import LoadedModel, load_model
from nasbench.data.packing import Corpus
from nasbench.evaluation.evaluator import Evaluator
from nasbench.model.shapes import ModelSpec
from nasbench.reproduce.recipe import Plan, Recipe
from nasbench.reproduce.speed import Speeds
from nasbench.runs import Run, RunSpec
from nasbench.supernet.loop import Progress, no_progress
from nasbench.supernet.supernet import Supernet

Log = Callable[[str], None]


@dataclass
class Bench:
    """What all stages share: the run, its model and text, read once."""

    recipe: Recipe
    out: Path
    device: str
    dtype: torch.dtype
    log: Log
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.plan = Plan(self.out / "plan.json")
        self.loaded: LoadedModel = load_model(self.recipe.model, dtype=self.dtype, device=self.device)
        self.shape: ModelSpec = self.loaded.shape
        recipe = self.recipe
        self.recipe.check(self.shape.num_layers)
        data = str(Path(recipe.data).resolve()) if recipe.data and Path(recipe.data).exists() else recipe.data
        spec = RunSpec(recipe.model, recipe.names, self.shape.num_layers, data, recipe.sequence, recipe.seed)
        self.run = Run.create(self.out, spec)
        self.speeds = Speeds(self.out / "speeds.csv", self.shape, recipe.contexts, recipe.batches)

    @cached_property
    def memo(self) -> dict[object, Any]:
        """What tasks make once for all placements: tokenised questions, texts that the teacher wrote."""
        return {}

    @cached_property
    def corpus(self) -> Corpus:
        return self.read(self.run.spec.data, self.recipe.sequence)

    def read(self, data: str, sequence: int) -> Corpus:
        """Text in rows; each row is read as one text where the settings say so."""
        corpus = Corpus.load(data, self.loaded.tokenizer, sequence)
        return corpus if self.recipe.training.documents else corpus.without_documents()

    def evaluator(self, net: Supernet) -> Evaluator:
        recipe = self.recipe
        return Evaluator(
            self.run,
            net,
            self.corpus,
            search_tokens=recipe.search_tokens,
            test_tokens=recipe.test_tokens,
            memo=self.memo,
        )

    def supernet(self) -> Supernet:
        """The trained one, read anew: finalising trains the mixers that it is given."""
        return Supernet.load(self.run, dtype=self.dtype, device=self.device, loaded=self.loaded)

    @cached_property
    def supernet_evaluator(self) -> Evaluator:
        """Of the supernet as it was trained; for after the training."""
        return self.evaluator(self.supernet())

    def forget(self) -> None:
        """Gives memory back that captured graphs and their tensors held."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
