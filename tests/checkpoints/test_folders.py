"""Model folders: configurations, tensors, and everything wrong that a folder can have."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, make_tokenizer
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints.families import FAMILIES, read_spec, write_config
from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import MachineError, UserError
from nasbench.model.shapes import MODELS, ModelSpec

SMALL_JET = ModelSpec(
    "small-jet", "jet_nemotron", 4, 32, 48, 4, 2, 8, 211, 64, 1e4, 1e-6, qkv_bias=True,
    published_placement="J A W J", defaults=(("W", "5"), ("J", "3x12x32")),
)  # fmt: skip


@pytest.fixture
def folder(tiny, tmp_path):
    """A private copy of a whole folder, to damage."""
    copy = tmp_path / "model"
    shutil.copytree(tiny("llama-tied")[0], copy)
    return copy


def edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(fields)
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "ABSENT"}))


@pytest.mark.parametrize("name", TINY)
def test_config_round_trip(name, tiny):
    shape = resolve_shape(str(tiny(name)[0]))
    again = read_spec(write_config(shape, shape.placement)[0], shape.name, "x")
    assert again == shape


@pytest.mark.parametrize("name", [name for name in sorted(MODELS) if MODELS[name].family in FAMILIES])
def test_built_in_shapes_survive_their_config(name):
    shape = MODELS[name]
    again = read_spec(write_config(shape, shape.placement)[0], name, "x")
    assert again.mixers(again.placement) == shape.mixers(shape.placement)
    assert again.parameters() == shape.parameters()


def test_hybrids_keep_their_arguments():
    shape = MODELS["smollm2-135m"]
    placement = shape.parse("A 2W 10J 3W512 14G")
    config, _ = write_config(shape, placement)
    assert config["model_type"] == "nasbench"
    again = read_spec(config, shape.name, "x")
    assert again.mixers(again.placement) == shape.mixers(placement)


def test_old_rope_fields_are_read(folder):
    new = resolve_shape(str(folder))
    edit(folder, rope_parameters="ABSENT", rope_theta=12345.0, rope_scaling=None)
    assert resolve_shape(str(folder)) == new
    scaling = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    edit(folder, rope_scaling=scaling | {"original_max_position_embeddings": 64})
    assert resolve_shape(str(folder)).rope_scaling == ("llama3", 8.0, 1.0, 4.0, 64.0)


def test_published_jet_nemotron_config():
    shape = MODELS["jet-nemotron-2b"]
    config, _ = write_config(shape, shape.placement, "jet-nemotron")
    assert config["layer_types"][14] == config["layer_types"][19] == "attn"
    assert config["layer_types"].count("swa") == 2
    jet = config["efficient_attention_config"]["jet"]
    jet["expand_v"] = 2.6666666667  # as published: not the exact quotient
    again = read_spec(config, "jet", "x")
    assert again.mixer("J").args == "12x96x256"
    assert again.mixer("W").args == "1152"


def test_the_convolution_of_a_jet_folder():
    shape = MODELS["jet-nemotron-2b"]
    config, _ = write_config(shape, shape.parse("28J@12x96x256x32x2"), "jet-nemotron")
    assert read_spec(config, "jet", "x").mixer("J").args == "12x96x256x32x2"
    with pytest.raises(UserError, match="no place for J@12x96x256x16"):
        write_config(shape, shape.parse("28J@12x96x256x16"), "jet-nemotron")
    config["efficient_attention_config"]["jet"]["conv_size"] = 1
    with pytest.raises(UserError, match="conv_size"):
        read_spec(config, "jet", "x")


@pytest.mark.parametrize("sizes", [(3, 12, 32), (9, 6, 52), (9, 3, 13), (12, 96, 256), (16, 128, 256)])
def test_a_quotient_of_head_sizes_does_not_round_down(sizes):
    """Published code takes int(head_dim * expand_v), and int(num_heads * head_dim * expand_v), and compares the two."""
    heads, key_dim, value_dim = sizes
    shape = replace(SMALL_JET, defaults=(("W", "5"), ("J", "x".join(map(str, sizes)))))
    jet = write_config(shape, shape.placement, "jet-nemotron")[0]["efficient_attention_config"]["jet"]
    found = [int(key_dim * jet["expand_v"]), int(heads * key_dim * jet["expand_v"])]
    assert found == [value_dim, heads * value_dim]
    assert jet["expand_v"] == pytest.approx(value_dim / key_dim, rel=1e-6)


def test_jet_format_refuses_what_it_has_no_place_for():
    shape = MODELS["smollm2-135m"]
    with pytest.raises(UserError, match="no layer kind G"):
        write_config(shape, shape.parse("29A G"), "jet-nemotron")
    with pytest.raises(UserError, match="W layers of 128 and 256"):
        write_config(shape, shape.parse("28A W W256"), "jet-nemotron")
    with pytest.raises(UserError, match="no place for qk_norm = True of qwen3"):
        write_config(MODELS["qwen3-1.7b"], MODELS["qwen3-1.7b"].placement, "jet-nemotron")


def test_a_hybrid_checkpoint_loads_as_it_was_saved(tmp_path):
    decoder = random_decoder(SMALL_JET, SMALL_JET.placement, seed=4)
    save_file(decoder.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_config(SMALL_JET, SMALL_JET.placement)[0]))
    make_tokenizer(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32).decoder
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids), decoder(ids))
    half = load_model(str(tmp_path), dtype=torch.bfloat16).decoder
    assert half.layers[0].self_attn.A_log.dtype == torch.float32
    assert half.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_shards_equal_one_file(tiny, folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits = load_model(str(folder)).decoder(ids)
        assert relative_rmse(logits, tiny("llama-tied")[1](ids).logits) <= LOGITS_FP32
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks b\.safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"residual_multiplier": 0.22}, r"the field residual_multiplier = 0\.22 is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "short_mscale": 2.0}}, "short_mscale"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_experts": 8}, "num_experts"),
        ({"hidden_act": "gelu"}, "unknown hidden_act 'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4, "factor": 4.0}}, "did you mean 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "ABSENT"}, "lacks the field hidden_size"),
        ({"hidden_size": -3}, "hidden_size = -3"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny'"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"hidden_size": 48, "head_dim": 16}, "has shape"),
        ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\.input_layernorm\.weight and 8 more"),
        ({"num_hidden_layers": 2}, r"has a tensor model\.layers\.2"),
        ({"tie_word_embeddings": False}, r"lacks lm_head\.weight"),
    ],
)
def test_wrong_configurations_are_named(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\x80 not it", b"half", b"[]"])
def test_corrupt_files_are_named(folder, file, content):
    path = folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == b"half" else content)
    with pytest.raises(UserError, match=file):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_absent_files_are_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(UserError, match=file):
        load_model(str(folder))


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle can run code and is refused"):
        load_model(str(folder))


def test_names_that_are_no_model(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"did you mean 'qwen3-1\.7b'"):
        resolve_shape("qwen3-1.7")
    with pytest.raises(UserError, match="is a shape without weights"):
        load_model("qwen2.5-3b")
    with pytest.raises(UserError, match="no such file"):
        resolve_shape(str(tmp_path / "absent.gguf"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is no model"):
        resolve_shape(str(tmp_path / "weights.bin"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((UserError, MachineError), match="nobody/nothing"):
        resolve_shape("nobody/nothing")


def test_resolving_needs_no_torch(tiny):
    import subprocess
    import sys

    code = (
        "import sys; from nasbench.checkpoints.resolve import resolve_shape; "
        f"print(resolve_shape({str(tiny('qwen3-tied')[0])!r}).qk_norm, resolve_shape('default').name, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "smollm2-135m", "False"]
