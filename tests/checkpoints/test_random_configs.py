"""Random changes of a configuration: nasbench computes what transformers does with it, or refuses it."""

import json
import random
import shutil

import pytest
import torch
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError

ABSENT = object()
IDS = torch.randint(0, 97, (1, 90), generator=torch.Generator().manual_seed(0))
YARN = {
    "beta_fast": [32, 16.0, 4], "beta_slow": [1, 2.0], "attention_factor": [1.0, 1.3], "mscale": [1.0, 0.7],
    "mscale_all_dim": [1.0, 0.5], "truncate": [True, False],
}  # fmt: skip
COMMON = {
    "rope_theta": [300.0, 10_000, 1e6], "rope_scaling": [None, {}], "rope_parameters": [ABSENT],
    "max_position_embeddings": [16, 64, 200], "original_max_position_embeddings": [16, 64, ABSENT],
    "tie_word_embeddings": [True, False, ABSENT], "rms_norm_eps": [1e-3, ABSENT], "head_dim": [ABSENT],
    "num_key_value_heads": [None, ABSENT], "hidden_act": ["silu", "swish", "gelu_pytorch_tanh", "relu"],
}  # fmt: skip
WINDOWS = {"sliding_window": [None, 1, 5, 13, 300, ABSENT], "use_sliding_window": [True, False, ABSENT]}
FAMILIES = {
    "llama3-rope": {"attention_bias": [True, False], "mlp_bias": [False], "pretraining_tp": [1]},
    "mistral-windows": WINDOWS,
    "qwen2-windows": WINDOWS | {"max_window_layers": [0, 1, 28, ABSENT], "layer_types": [ABSENT]},
    "qwen3-windows": WINDOWS | {"max_window_layers": [0, 1, 28], "layer_types": [ABSENT]},
    "qwen3-moe-mixed": WINDOWS
    | {"norm_topk_prob": [True, False], "decoder_sparse_step": [1, 2], "mlp_only_layers": [[], [1]]},
    "gemma3-scale": {
        "query_pre_attn_scalar": [8, 64, ABSENT], "sliding_window": [5, 300, ABSENT], "layer_types": [ABSENT],
        "rope_local_base_freq": [300.0], "final_logit_softcapping": [None, 30.0], "_sliding_window_pattern": [2],
    },
    "smollm3-windows": WINDOWS | {"no_rope_layers": [[0, 0, 0], [1, 1, 0, 1], ABSENT], "layer_types": [ABSENT]},
    "phi3-longrope": {"partial_rotary_factor": [0.5, 0.75, 1.0], "sliding_window": [5, None]},
    "olmo2": {"attention_bias": [False]},
}  # fmt: skip


def rope(draw):
    kind = draw.choice(["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
    values = {draw.choice(["rope_type", "type"]): kind}
    if draw.random() < 0.7:
        values["rope_theta"] = draw.choice([500.0, 10_000, 1e6])
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        values["factor"] = draw.choice([1.0, 1.5, 4])
    if kind in ("llama3", "yarn", "longrope") and draw.random() < 0.7:
        values["original_max_position_embeddings"] = draw.choice([16, 64])
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4}
    if kind == "yarn":
        values |= {name: draw.choice(options) for name, options in YARN.items() if draw.random() < 0.3}
    if kind == "longrope":
        pairs = draw.choice([8, 6, 4])
        values |= {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [1.5 + i for i in range(pairs)]}
    return values


def changed(draw, config, options):
    config = json.loads(json.dumps(config))
    for _ in range(draw.choice([1, 1, 2, 3])):
        name = draw.choice([*options, "rope_scaling", "rope_parameters", "layer_types"])
        value = draw.choice(options[name]) if name in options else None
        if name in ("rope_scaling", "rope_parameters") and draw.random() < 0.7:
            value = rope(draw)
        if name == "layer_types" and draw.random() < 0.8:
            kinds = ["full_attention", "sliding_attention"]
            value = [draw.choice(kinds) for _ in range(config["num_hidden_layers"])]
        config[name] = value
        if value is ABSENT:
            del config[name]
    return config


def theirs(folder):
    """transformers' logits; None where it refuses the configuration or invents weights."""
    import transformers

    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        return None if info["missing_keys"] or info["unexpected_keys"] else model.eval()(IDS).logits
    except Exception:
        return None


@pytest.mark.parametrize("count", [3, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_equal_or_refused(name, count, tiny, tmp_path):
    folder, draw, compared = tmp_path / "model", random.Random(name), 0
    shutil.copytree(tiny(name)[0], folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(count):
        now = changed(draw, config, COMMON | FAMILIES[name])
        path.write_text(json.dumps(now))
        try:
            logits = load_model(str(folder)).decoder(IDS)
        except UserError:
            continue
        wanted = theirs(folder)
        if wanted is not None:
            compared += 1
            error = relative_rmse(logits, wanted)
            difference = {key: value for key, value in now.items() if config.get(key) != value}
            assert error <= LOGITS_FP32, f"{error:.2e}: {difference}"
    assert count < 10 or compared > count // 8
