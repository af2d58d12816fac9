"""Inputs that gave silent wrong numbers or tracebacks: what transformers computes, or one line that names the field."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints.families import read_spec, write_config
from nasbench.checkpoints.load import load_model
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError

IDS = torch.arange(200)[None]


@pytest.fixture
def folder(tiny, tmp_path):
    """A private copy of a whole folder with a tied head, to damage."""
    copy = tmp_path / "model"
    shutil.copytree(tiny("llama-tied")[0], copy)
    return copy


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def equals_transformers(folder):
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return relative_rmse(load_model(str(folder)).decoder(IDS), reference(IDS).logits) <= LOGITS_FP32


def test_truncation_and_padding_of_a_tokenizer_are_off(folder):
    path = folder / "tokenizer.json"
    plain = load_model(str(folder)).tokenizer
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(path))
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.encode("a long text") == plain.encode("a long text")
    assert tokenizer.encode_batch(["a", "a long text"]) == plain.encode_batch(["a", "a long text"])


def test_tokenizers_that_differ_anywhere_share_no_cached_tokens(folder, tmp_path, monkeypatch):
    from nasbench.data.packing import Corpus

    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"rare zebra number {i} " * 9}) + "\n" for i in range(60)))
    first = load_model(str(folder)).tokenizer
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["z"], vocabulary["b"] = vocabulary["b"], vocabulary["z"]
    path.write_text(json.dumps(content))
    second = load_model(str(folder)).tokenizer
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    assert len({tokenizer.fingerprint for tokenizer in (first, second, load_model(str(folder)).tokenizer)}) == 3
    one, two = Corpus.load(str(text), first, 16), Corpus.load(str(text), second, 16)
    ids = set(first.encode("zb"))
    assert not torch.equal(one.test, two.test)
    assert set(second.encode("zb")) == ids


def test_a_tied_matrix_may_stand_under_the_heads_name(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert equals_transformers(folder)


@pytest.mark.parametrize("other", [False, True])
def test_a_head_under_the_tie_flag_is_used_where_it_differs(folder, other):
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if other:
        head[-1, -1] += 3
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve_shape(str(folder)).tie_embeddings is not other
    assert equals_transformers(folder)


def test_of_two_ropes_the_scaling_wins(folder):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit(folder / "config.json", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    shape = resolve_shape(str(folder))
    assert (shape.rope_scaling[:2], shape.rope_theta) == (("llama3", 8.0), 10_000.0)
    assert equals_transformers(folder)


def test_the_whole_file_wins_over_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "a.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, "a.safetensors"))
    assert equals_transformers(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "is not a JSON object"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": "../a.safetensors"}}, "no file of its folder"),
    ],
)
def test_an_index_of_another_form_is_refused(folder, index, message):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_end_tokens_of_both_files_count(folder):
    edit(folder / "config.json", eos_token_id=2)
    edit(folder / "generation_config.json", eos_token_id=[2, 70])
    assert load_model(str(folder)).tokenizer.eos_ids == (2, 70)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", 2.0, True, [1, "2"], {"a": 1}, -1, 10**400])
def test_end_tokens_of_another_type_are_refused(folder, file, value):
    edit(folder / file, eos_token_id=value)
    with pytest.raises(UserError, match=rf"{file}: eos_token_id = .*is not a token id") as caught:
        load_model(str(folder))
    assert len(str(caught.value)) < 400


def test_a_prompt_has_one_begin_token(folder):
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("!", special=True)])
    begin = backend.token_to_id("!")
    backend.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.encode_prompt("ab") == tokenizer.encode_prompt("!ab") == [begin, *tokenizer.encode("ab")]


def test_a_token_beyond_the_embedding_is_named(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([f"[{number}]" for number in range(211 - backend.get_vocab_size())] + ["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.encode("a")
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UserError, match=r"token '\[PAD\]' has id 211, beyond the model's 211 embeddings"):
            encode("a [PAD]")


def test_a_text_begins_and_ends_with_ids_that_have_an_embedding(folder):
    from tokenizers.processors import TemplateProcessing

    edit(folder / "config.json", eos_token_id=500)
    edit(folder / "generation_config.json", eos_token_id=[211, 2, 210])
    assert load_model(str(folder)).tokenizer.eos_ids == (2, 210)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([f"[{number}]" for number in range(60)])
    begin = backend.token_to_id("[59]")
    backend.post_processor = TemplateProcessing(single="[59] $A", special_tokens=[("[59]", begin)])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=rf"token '\[59\]' has id {begin}, beyond the model's 211 embeddings"):
        load_model(str(folder))


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    sizes = {"hidden_size": 130, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    config = sizes | {"intermediate_size": 128, "vocab_size": 367, "max_position_embeddings": 2048}
    with pytest.raises(UserError, match="hidden_size = 130 is no multiple of num_attention_heads = 4"):
        read_spec({"model_type": "llama"} | config, "x", "c.json")
    assert read_spec({"model_type": "llama", "head_dim": 32} | config, "x", "c.json").head_dim == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_types", 5),
        ("bos_token_id", "1"),
        ("layer_types", [5, 5, 5]),
        ("hidden_size", 10**400),
        ("rms_norm_eps", 10**400),
        ("rms_norm_eps", float("nan")),
        ("num_hidden_layers", 10**9),
        ("tie_word_embeddings", "no"),
        ("tie_word_embeddings", 1),
        ("rope_scaling", 7),
        ("rope_scaling", {"rope_type": ["llama3"]}),
        ("model_type", {"a": 1}),
        ("hidden_act", ["silu"]),
        ("mlp_bias", 0.5),
    ],
)
def test_values_of_another_type_or_size_are_named(folder, field, value):
    edit(folder / "config.json", **{field: value})
    with pytest.raises(UserError, match=rf"config\.json.*{field}|config\.json: {field}") as caught:
        resolve_shape(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight is .*8.*quantised"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=rf"{file} is a Git LFS pointer"):
        load_model(str(folder))


def test_the_published_jet_nemotron_writes_an_epsilon_as_text():
    from nasbench.model.shapes import MODELS

    shape = MODELS["jet-nemotron-2b"]
    config, _ = write_config(shape, shape.placement)
    config["efficient_attention_config"]["jet"]["norm_eps"] = "1e-5"
    assert read_spec(config, "jet", "x").mixer("J") == shape.mixer("J")
    config["efficient_attention_config"]["jet"]["norm_eps"] = "1e-6"
    with pytest.raises(UserError, match="norm_eps = '1e-6'"):
        read_spec(config, "jet", "x")
