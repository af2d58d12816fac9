"""The whole loop by the commands of docs/add-a-block.md, on its mixer and on an FFN and a family of another package."""

import json
import shlex

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from supernet_tiny import one_thread, save_tokenizer, text_file
from toy_package import fenced, toys

from nasbench.checkpoints.families import read_spec
from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.cli import main
from nasbench.runs import Run
from nasbench.spaces.placement import parse_placement
from nasbench.supernet.supernet import Supernet

__all__ = ["one_thread", "text_file", "toys"]

CONFIG = {
    "model_type": "toy", "activation_function": "squared_relu", "n_layer": 4, "n_embd": 32, "n_inner": 48, "n_head": 4,
    "n_kv_head": 2, "n_head_dim": 8, "vocab_size": 256, "n_positions": 512, "eos_token_id": 0,
}  # fmt: skip
SETTINGS = "ridge_tokens = 256\nalign_batch_tokens = 128\nsupernet_batch_tokens = 128\n"


@pytest.fixture
def toy_model(toys, tmp_path):
    """A random checkpoint under the family's own names."""
    folder = tmp_path / "toy-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    decoder = random_decoder(read_spec(CONFIG, "toy", "config.json"), ("A",) * CONFIG["n_layer"])
    theirs = {"model.embed_tokens": "wte", "model.norm": "ln_f", "model.layers": "h", "self_attn": "attn", "_proj": ""}
    theirs |= {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "mlp.up": "mlp.c_fc"}
    theirs |= {"mlp.down": "mlp.c_proj"}
    weights = {}
    torch.manual_seed(2)
    for name, weight in decoder.state_dict().items():
        for our, their in theirs.items():
            name = name.replace(our, their)
        weights[name] = weight if ".ln_" in name else torch.randn_like(weight) * 0.25
    save_file(weights, folder / "model.safetensors")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def nas(capsys):
    def call(*args):
        code = main.run([str(arg) for arg in args])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


def test_profile_distill_search_report_export(nas, toy_model, text_file, tmp_path):
    db, path, settings = tmp_path / "db", tmp_path / "run", tmp_path / "settings.toml"
    settings.write_text(fenced("toml")[1] + SETTINGS)
    small = {
        "default": toy_model, "profiles": db, "runs/z": path, "text.jsonl": text_file, "z.toml": settings, "1k": 256,
        "1M": 256, "4M": 256, "200": 8, "4,8": "1,2",
    }  # fmt: skip
    further = {
        "profile": "--budget 0.02 --device cpu --dtype fp32 --json",
        "distill": "--sequence 32 --device cpu --dtype fp32",
        "search": "--search-tokens 256 --test-tokens 256 --eval-dtype fp32 --device cpu",
        "report": "",
    }
    printed = {}
    for line in fenced("sh")[0].splitlines():
        _, command, *words = shlex.split(line)
        printed[command] = nas(command, *(small.get(word, word) for word in words), *shlex.split(further[command]))

    rows = pd.read_csv(json.loads(printed["profile"])["path"], keep_default_na=False, dtype=str)
    for mode in ("decode", "prefill"):
        mine = rows[(rows["mode"] == mode) & (rows.status == "ok")]
        assert {("A", ""), ("Z", "8"), ("square", "48")} <= set(zip(mine.block, mine.args, strict=True))
    assert "mlp" not in set(rows.block)
    trials, front = pd.read_csv(path / "trials.csv"), pd.read_csv(path / "front.csv")
    assert trials.placement.str.contains("Z").any()
    hybrid = front.placement[front.placement.str.contains("Z")].iloc[0]
    page = (path / "report" / "index.html").read_text()
    assert "running mean 8" in page
    assert 'class="k-Z"' in page

    # Export
    run = Run.open(path)
    net = Supernet.load(run)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    for placement, model_type in ((hybrid, "nasbench"), ("4A", "toy")):
        out = tmp_path / model_type
        nas("export", path, "--placement", placement, "--out", out, "--format", "hf", "--dtype", "fp32")
        assert json.loads((out / "config.json").read_text())["model_type"] == model_type
        with torch.no_grad():
            expected, found = (
                decoder(tokens) for decoder in (net.select(parse_placement(placement)), load_model(str(out)).decoder)
            )
        assert found.equal(expected)
        nas("generate", out, "--prompt", "the layer", "--max-new-tokens", "4", "--device", "cpu")
    original, again = (load_file(folder / "model.safetensors") for folder in (toy_model, tmp_path / "toy"))
    assert original.keys() == again.keys()
    assert all(original[name].equal(again[name]) for name in original)
