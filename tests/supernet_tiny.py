"""A small random Llama folder that `load_model` reads, without transformers, a text for it, and runs over both.

Fixtures for the tests of supernet, evaluation and their commands, whose conftest.py imports them.
"""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from nasbench.checkpoints.families import write_config
from nasbench.checkpoints.load import random_decoder
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run, RunSpec
from nasbench.spaces.placement import parse_placement
from nasbench.supernet import checkpoint

WORDS = ("the", "a", "of", "layer", "state", "key", "value", "window", "model", "token", "each", "holds", "or", "not")
LAYERS = 4
SHAPE = ModelSpec("tiny", "llama", LAYERS, 32, 48, 4, 2, 8, 256, 512, 10_000.0, 1e-5)


def save_tiny(folder):
    """Writes config.json, tokenizer.json (one id per byte) and weights of ordinary size."""
    folder.mkdir(parents=True, exist_ok=True)
    decoder = random_decoder(SHAPE, parse_placement(f"{LAYERS}A"), seed=1)
    torch.manual_seed(2)
    weights = decoder.state_dict()
    # Sharper than a fresh model: attention and predictions must be worth imitating.
    weights = {name: w if "norm" in name else torch.randn_like(w) * 0.25 for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors")
    config = {**write_config(SHAPE, decoder.placement)[0], "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    """Writes tokenizer.json of one id per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def save_supernet(net, folder):
    """Writes an untrained supernet's weights as a checkpoint that `Supernet.load` reads."""
    weights = {name: parameter.float() for name, parameter in net.trained_parameters().items()}
    state = {"stage": "done", "step": 0, "frozen": list(net.frozen), "solved": list(net.solved)}
    net.version = checkpoint.save(folder, "done-00000000", weights, {}, state).version


@pytest.fixture(autouse=True)
def one_thread(tmp_path_factory, monkeypatch):
    """Bit-equal sums, and a cache folder of the session's own."""
    torch.set_num_threads(1)
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=12)) for _ in range(1600)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture
def make_run(tiny_model, text_file, tmp_path):
    """make_run(name, names=("A", "W8", "J")) -> Run over the tiny model."""

    def make(name="run", names=("A", "W8", "J"), sequence=32):
        return Run.create(tmp_path / name, RunSpec(str(tiny_model), names, 4, str(text_file), sequence))

    return make
