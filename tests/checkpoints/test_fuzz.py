"""Damaged inputs of every kind: each ends in a model or in one UserError, within two seconds, never in a traceback."""

import json
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_gguf

from nasbench.checkpoints.load import load_model
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError

LONGEST_S = 2.0
CASES = [60, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]

ODD = [
    0, 1, -1, 2, 3, 1 << 31, 1 << 63, 10**400, 1.5, 1e308, 1e-300, -0.0, float("nan"), float("inf"), True, False, None,
    "", "2", "1e-5", "nan", "default", "yarn", "llama3", "dynamic", "longrope", "sliding_attention", [], {}, [None],
    ["full_attention"] * 3, ["sliding_attention"] * 3, [0, 1, 1], {"rope_type": "yarn", "factor": 4},
]  # fmt: skip
FIELDS = [
    "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "use_sliding_window", "head_dim",
    "max_window_layers", "num_experts", "num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step",
    "quantization_config",
    "partial_rotary_factor", "no_rope_layers", "query_pre_attn_scalar", "eos_token_id", "hidden_act", "placement",
    "base_model_type", "efficient_attention_config", "tie_word_embeddings", "original_max_position_embeddings", "x",
]  # fmt: skip
NAMES = ("model.norm.weight", "model.embed_tokens.weight")
VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), inner),
    max_leaves=6,
)


def copied(value):
    return json.loads(json.dumps(value))


def mutated(data, document):
    """The document with one to three values replaced, removed or added, anywhere in it."""
    document = copied(document)
    for _ in range(data.draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys or data.draw(st.integers(0, 5)) == 0:
                if isinstance(place, dict):
                    place[data.draw(st.sampled_from(FIELDS))] = copied(data.draw(VALUES))
                else:
                    place.append(copied(data.draw(VALUES)))
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and data.draw(st.booleans()):
                place = place[key]
                continue
            if data.draw(st.integers(0, 3)):
                place[key] = copied(data.draw(VALUES))
            else:
                del place[key]
            break
    return document


def flipped(data, content, most):
    """The bytes with a few of the first `most` changed, or with the end cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(most, len(content)) - 1))] = data.draw(st.integers(0, 255))
    return bytes(content if data.draw(st.booleans()) else content[: data.draw(st.integers(0, len(content)))])


def outcome(work):
    """Runs one case. Anything but a UserError of one line is a fault, and so is more than two seconds."""
    start = time.process_time()
    told = ""
    try:
        work()
    except UserError as error:
        told = str(error)
    assert "\n" not in told, told
    assert len(told) < 1500, told
    took = time.process_time() - start
    assert took < LONGEST_S, f"{took:.1f} s"


def run(count):
    """hypothesis runs the decorated test `count` times: the same cases every time where there are few."""
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=count < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@torch.inference_mode()
def use(folder):
    """What a user does with a model: its shape, its weights, a text."""
    spec = resolve_shape(str(folder))
    spec.cache_bytes(spec.placement, 1, min(spec.max_context, 1000))
    loaded = load_model(str(folder))
    ids = loaded.tokenizer.encode_prompt("a 1\n") or [0]
    loaded.decoder(torch.tensor([ids[: loaded.shape.max_context]]))
    loaded.tokenizer.decode(ids)


@pytest.fixture
def folders(tiny, tmp_path):
    """Private copies of tiny models, to damage."""

    def get(*names):
        for name in names:
            if not (tmp_path / name).is_dir():
                shutil.copytree(tiny(name)[0], tmp_path / name)
                use(tmp_path / name)  # imports what loading needs
        return [tmp_path / name for name in names]

    return get


@pytest.mark.parametrize("count", CASES)
def test_config(folders, count):
    names = ("llama3-rope", "qwen2-windows", "qwen3-moe", "gemma3-ropes", "smollm3-windows", "phi3-longrope", "olmo2")
    models = folders(*names)
    configs = [json.loads((folder / "config.json").read_text()) for folder in models]

    @run(count)
    @given(st.data())
    def case(data):
        number = data.draw(st.integers(0, len(models) - 1))
        config = mutated(data, configs[number])
        (models[number] / "config.json").write_text(json.dumps(config))
        outcome(lambda: use(models[number]))

    case()


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("file", ["generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_files_beside_the_weights(folders, count, file):
    (folder,) = folders("llama-tied")
    whole = {
        "generation_config.json": {"eos_token_id": [2, 70], "bos_token_id": 1, "temperature": 0.6, "do_sample": True},
        "tokenizer_config.json": {
            "bos_token": "!", "eos_token": {"content": "?", "lstrip": False}, "chat_template": "{{ messages }}",
            "added_tokens_decoder": {"5": {"content": "&", "special": True}}, "additional_special_tokens": ["#"],
        },
        "model.safetensors.index.json": {"metadata": {}, "weight_map": dict.fromkeys(NAMES, "a.safetensors")},
    }[file]  # fmt: skip
    if "index" in file:
        (folder / "model.safetensors").rename(folder / "a.safetensors")

    @run(count)
    @given(st.data())
    def case(data):
        text = json.dumps(data.draw(VALUES) if data.draw(st.integers(0, 9)) == 0 else mutated(data, whole))
        content = text.encode() if data.draw(st.booleans()) else flipped(data, text.encode(), 10_000)
        (folder / file).write_bytes(content)
        outcome(lambda: use(folder))

    case()


@pytest.mark.parametrize("count", CASES)
def test_tokenizer(folders, count):
    (folder,) = folders("llama-tied")
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole |= {
        "added_tokens": [{"id": 3, "content": "$"} | special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "$", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"$": {"id": "$", "ids": [3], "tokens": ["$"]}},
        },
    }
    whole["model"]["merges"] = [["a", "b"]]
    whole["model"]["vocab"] = dict(list(whole["model"]["vocab"].items())[:90]) | {"ab": 90}
    path.write_text(json.dumps(whole))
    use(folder)

    @run(count)
    @given(st.data())
    def case(data):
        text = json.dumps(mutated(data, whole))
        path.write_bytes(text.encode() if data.draw(st.booleans()) else flipped(data, text.encode(), 2500))
        outcome(lambda: use(folder))

    case()


KEYS = [
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.attention.head_count",
    "llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor",
    "llama.attention.layer_norm_rms_epsilon", "llama.attention.key_length", "general.alignment", "split.count",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template", "llama.unheard_of",
]  # fmt: skip


@pytest.mark.parametrize("count", CASES)
def test_gguf(tmp_path, monkeypatch, count):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    whole, path = write_gguf(tmp_path / "x.gguf").read_bytes(), tmp_path / "odd.gguf"
    use(tmp_path / "x.gguf")  # imports what loading needs
    odd = st.sampled_from([0, 1, 3, 1 << 31, 0.5, 1e30, True, "", "llama", "\0", None, [1], ["a", "b"], [0.5] * 42])

    @run(count)
    @given(st.data())
    def case(data):
        if data.draw(st.booleans()):
            path.write_bytes(flipped(data, whole, 2500))
        else:
            keys = data.draw(st.dictionaries(st.sampled_from(KEYS), odd, min_size=1, max_size=2))
            write_gguf(path, **{key.replace(".", "__"): value for key, value in keys.items()})
        outcome(lambda: use(path))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    case()
