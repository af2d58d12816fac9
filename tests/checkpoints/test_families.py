"""Families: configurations and names both ways, formats that cannot say all, GGUF files, a family from outside."""

import json
import shutil
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import KEYS, write_gguf
from tiny_models import LLAMA3, TINY, make_tokenizer
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints import families
from nasbench.checkpoints.families import FAMILIES, read_spec, write_config
from nasbench.checkpoints.families.family import Family
from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError
from nasbench.core.registry import Registry
from nasbench.export import write_model
from nasbench.model.shapes import ModelSpec

IDS = torch.randint(0, 211, (2, 60), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TINY)
def test_a_written_folder_is_the_checkpoint_that_was_read(name, tiny, tmp_path):
    """config.json means the same, every tensor has its name and value again, and transformers computes the same."""
    import transformers

    folder, reference = tiny(name)
    loaded = load_model(str(folder))
    out = write_model(loaded, tmp_path / "out", "hf", {})
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for tensor, values in before.items():
        torch.testing.assert_close(after[tensor], values, rtol=1e-6, atol=1e-6, msg=tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        reference(IDS[:, :3])  # a dynamic rotary embedding keeps the frequencies of longer texts until a short one
        assert relative_rmse(again(IDS).logits, reference(IDS).logits) <= LOGITS_FP32
    assert load_model(str(out)).shape == replace(loaded.shape, name="out")


@pytest.mark.parametrize("name", ["qwen2-windows", "qwen3-moe", "gemma3"])
def test_a_hybrid_of_any_family_loads_as_it_was_written(name, tiny, tmp_path):
    spec = resolve_shape(str(tiny(name)[0]))
    placement = ("J@2x8x16", *spec.placement[1:-1], "W7" if spec.placement[-1].startswith("W") else "G")
    decoder = random_decoder(spec, placement, seed=2)
    loaded = replace(load_model(str(tiny(name)[0])), decoder=decoder)
    out = write_model(loaded, tmp_path / "out", "hf", {})
    assert json.loads((out / "config.json").read_text())["model_type"] == "nasbench"
    with torch.inference_mode():
        assert torch.equal(load_model(str(out)).decoder(IDS), decoder(IDS))


def test_what_a_format_cannot_say_is_refused(tiny):
    gemma = resolve_shape(str(tiny("gemma3")[0]))
    with pytest.raises(UserError, match="layer 0, A"):
        write_config(gemma, ("A",) * gemma.num_layers)
    for name, message in (("qwen3-moe", "layer 0, A"), ("gemma3", "no place for"), ("llama3-rope", None)):
        spec = resolve_shape(str(tiny(name)[0]))
        if message:
            with pytest.raises(UserError, match=message):
                write_config(spec, spec.placement, "jet-nemotron")
        else:
            assert write_config(spec, spec.placement, "jet-nemotron")[0]["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate = False"),
        ("gemma3", {"original_max_position_embeddings": 64}, "original_max_position_embeddings = 64 is not supported"),
        ("gemma3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5 is not supported"),
        (
            "phi3-partial",
            {"rope_parameters": {"partial_rotary_factor": 0.7}},
            r"partial_rotary_factor = 0\.7 is not a share of 16 channels",
        ),
        ("phi3-longrope", {"original_max_position_embeddings": "64"}, "original_max_position_embeddings = '64'"),
        ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "a list of 6 numbers"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn"}}, "lacks the field factor"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1}}, "too small for yarn"),
        ("llama3-rope", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "is not above low_freq_factor = 4"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers = .1, 0. is not a list of 0 or 1 for each of 5"),
        ("smollm3", {"no_rope_layers": 1}, "no_rope_layers = 1 is not a list"),
        ("olmo2", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, the model has 7 layers"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "moe"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size"),
        ("qwen2-windows", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2-windows", {"use_sliding_window": False}, "the model has no sliding_window"),
        ("mistral-windows", {"sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_fields_of_a_family_are_read_or_refused(name, fields, message, tiny):
    config = json.loads((tiny(name)[0] / "config.json").read_text())
    assert read_spec(config, "x", "c.json")
    with pytest.raises(UserError, match=message) as caught:
        read_spec(config | fields, "x", "c.json")
    assert str(caught.value).startswith("c.json")


def test_layers_beyond_the_configuration_are_named(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("phi3-partial")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"has a tensor model\.layers\.1"):
        load_model(str(folder))


def test_absent_fields_mean_what_transformers_takes_them_for(tiny):
    import transformers

    for name, absent in (("gemma3", ("layer_types", "sliding_window")), ("mistral-windows", ("sliding_window",))):
        config = json.loads((tiny(name)[0] / "config.json").read_text())
        for field in absent:
            del config[field]
        if name == "gemma3":
            config["_sliding_window_pattern"] = 3  # of no effect
        theirs = transformers.AutoConfig.for_model(**config)
        spec = read_spec(config, "x", "c.json")
        assert spec.mixer("W").args == str(theirs.sliding_window)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * spec.num_layers
        assert [name[0] for name in spec.placement] == ["A" if kind == "full_attention" else "W" for kind in kinds]


GGUF = {
    "llama-untied": ("llama", gguf.MODEL_ARCH.LLAMA),
    "qwen2-untied": ("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3-tied": ("qwen3", gguf.MODEL_ARCH.QWEN3),
    "qwen3-moe": ("qwen3moe", gguf.MODEL_ARCH.QWEN3MOE),
    "gemma3": ("gemma3", gguf.MODEL_ARCH.GEMMA3),
    "smollm3": ("smollm3", gguf.MODEL_ARCH.SMOLLM3),
    "phi3-windows": ("phi3", gguf.MODEL_ARCH.PHI3),
    "phi3-partial": ("phi3", gguf.MODEL_ARCH.PHI3),
    "phi3-longrope": ("phi3", gguf.MODEL_ARCH.PHI3),
    "olmo2": ("olmo2", gguf.MODEL_ARCH.OLMO2),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_is_the_folder_it_was_made_from(name, tiny, tmp_path, monkeypatch):
    """Names by the gguf package's own table, values as llama.cpp stores them."""
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    folder, reference = tiny(name)
    architecture, kind = GGUF[name]
    spec = resolve_shape(str(folder))
    table = gguf.get_tensor_name_map(kind, spec.num_layers)
    tensors = {}
    for tensor, values in load_file(folder / "model.safetensors").items():
        module, _, leaf = tensor.rpartition(".")
        if ".experts." in module:
            prefix, _, rest = module.partition(".experts.")
            number, part = rest.split(".")
            tensors.setdefault(f"{prefix}.experts.{part}", {})[int(number)] = values.numpy()
            continue
        if architecture == "gemma3" and module.endswith("norm"):
            values = values + 1
        if architecture in ("llama", "smollm3") and module.endswith(("q_proj", "k_proj")):
            heads = spec.num_heads if module.endswith("q_proj") else spec.num_kv_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        tensors[f"{table.get_name(module)}.{leaf}"] = values.numpy()
    for module in [module for module in tensors if ".experts." in module]:
        matrices = tensors.pop(module)
        tensors[f"{table.get_name(module)}.weight"] = np.stack([matrices[i] for i in sorted(matrices)])
    sizes = {
        "block_count": spec.num_layers, "context_length": spec.max_context, "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size, "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads, "attention.key_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.rms_eps, "rope.freq_base": spec.rope_theta,
    }  # fmt: skip
    if architecture == "gemma3":
        sizes["attention.sliding_window"] = 9
    if architecture == "phi3":
        sizes |= {"rope.dimension_count": spec.rotary_dim or 16, "rope.scaling.original_context_length": 64}
        sizes["attention.sliding_window"] = 17 if name == "phi3-windows" else 0
    if name == "phi3-longrope":
        _, attention, _, *factors = spec.rope_scaling
        sizes["rope.scaling.attn_factor"] = attention
        for kind, half in (("short", factors[:6]), ("long", factors[6:])):
            tensors[f"rope_factors_{kind}.weight"] = np.array(half, np.float32)
    if architecture == "qwen3moe":
        sizes |= {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 24}
    keys = {f"{architecture}.{key}": value for key, value in sizes.items()} | {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(211)],
        "tokenizer.ggml.token_type": [1] * 211,
        "tokenizer.ggml.merges": [],
    }
    path = tmp_path / "x.gguf"
    absent = {key: None for key in KEYS if key.startswith("llama.") and key not in keys}
    write_gguf(path, architecture, tensors, **{key.replace(".", "__"): value for key, value in (absent | keys).items()})
    found = resolve_shape(str(path))
    assert found.rope_scaling[:1] == spec.rope_scaling[:1]
    assert found.rope_scaling[1:] == pytest.approx(spec.rope_scaling[1:])
    assert replace(found, rope_scaling=()) == replace(spec, name="x", rope_scaling=())
    with torch.inference_mode():
        assert relative_rmse(load_model(str(path)).decoder(IDS), reference(IDS).logits) <= LOGITS_FP32


class Toy(Family):
    """A family from outside, with another name for the mixer."""

    model_type = "toy"
    architecture = "ToyForCausalLM"
    modules = {"self_attn": "attention"}  # noqa: RUF012


def test_a_family_from_outside_is_one_class(tmp_path, monkeypatch):
    package = tmp_path / "site"
    info = package / "toyfamily-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toyfamily\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nasbench.families]\ntoy = test_families:Toy\n")
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setitem(sys.modules, "test_families", sys.modules[__name__])
    registry = Registry("model_type", group="nasbench.families")
    for name in list(FAMILIES):
        registry.register(name, FAMILIES[name])
    for module in (families, families.hybrid, sys.modules["nasbench.checkpoints.load"]):
        monkeypatch.setattr(module, "FAMILIES", registry)
    spec = ModelSpec("small-toy", "toy", 3, 32, 48, 4, 2, 8, 211, 64, 1e4, 1e-6)
    decoder = random_decoder(spec, spec.placement, seed=1)
    folder = tmp_path / "model"
    folder.mkdir()
    config, family = write_config(spec, spec.placement)
    tensors = {
        theirs: value
        for name, tensor in decoder.state_dict().items()
        for theirs, value in family.split(name, tensor, spec, spec.placement)
    }
    assert "model.layers.0.attention.q_proj.weight" in tensors
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    with torch.inference_mode():
        assert torch.equal(load_model(str(folder)).decoder(IDS), decoder(IDS))
