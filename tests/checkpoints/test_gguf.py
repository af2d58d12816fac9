"""GGUF files: every key is read or refused by name, split files, and what a damaged file says."""

import math
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny_gguf import HEAD_DIM, HIDDEN, random_tensors, write_gguf

from nasbench.checkpoints.gguf_file import converted_folder, file_sha256
from nasbench.checkpoints.load import load_model
from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_small_file_loads(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=2)
    loaded = load_model(str(path))
    assert loaded.shape == resolve_shape(str(path))
    assert loaded.tokenizer.eos_ids == (1, 2), "the end of a turn ends a text too"
    assert loaded.tokenizer.bos_id is None
    assert torch.equal(loaded.decoder.model.embed_tokens.weight, torch.tensor(random_tensors()["token_embd.weight"]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.scale", 0.5),
        ("llama.attention.sliding_window", 16),
        ("llama.attention.value_length", 4),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", "2"),
        ("llama.attention.head_count_kv", [1, 2]),
        ("llama.attention.causal", False),
        ("general.type", "adapter"),
        ("llama.logit_scale", 2.0),
        ("llama.embedding_scale", 2.0),
        ("llama.expert_count", 4),
        ("llama.block_count", None),
        ("llama.vocab_size", 5),
        ("tokenizer.ggml.pre", "deepseek"),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.bos_token_id", 5000),
        ("tokenizer.ggml.tokens", ["a"] * 42),
        ("tokenizer.ggml.merges", ["zz qq"]),
        ("tokenizer.ggml.unheard_of", 1),
    ],
)
def test_a_key_that_changes_the_result_is_refused(tmp_path, cache, key, value):
    path = write_gguf(tmp_path / "x.gguf", **{key.replace(".", "__"): value})
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert key in message or {"merges": "merges", "tokens": "tokens"}[key.rpartition(".")[2]] in message
    assert "\n" not in message
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.rope.scaling.factor", 1.0), ("llama.rope.scaling.type", "none"), ("llama.attention.scale", 8**-0.5)],
)
def test_a_neutral_key_is_taken(tmp_path, key, value):
    assert resolve_shape(str(write_gguf(tmp_path / "x.gguf", **{key.replace(".", "__"): value})))


def test_a_factor_without_a_type_scales_linearly(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama__rope__scaling__factor=4.0)
    assert resolve_shape(str(path)).rope_scaling == load_model(str(path)).shape.rope_scaling == ("linear", 4.0)


def test_llama_3_scaling_is_recognised_by_its_divisors(tmp_path):
    """Computed as llama.cpp's converter does, frequency by frequency."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 500_000 ** (2 * i / HEAD_DIM)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        far, near = wavelength > 8192 / 1, wavelength < 8192 / 4
        divisors.append(8 if far else 1 if near else 1 / ((1 - smooth) / 8 + smooth))
    tensors = random_tensors() | {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tensors=tensors, llama__rope__freq_base=500_000.0)
    assert load_model(str(path)).shape.rope_scaling == ("llama3", 8.0, 1.0, 4.0, 8192.0)
    tensors["rope_freqs.weight"][-1] += 1
    with pytest.raises(UserError, match="rope_freqs is not Llama 3's scaling"):
        resolve_shape(str(write_gguf(tmp_path / "y.gguf", tensors=tensors, llama__rope__freq_base=500_000.0)))


def test_llama_bpe_has_its_begin_token_and_takes_whole_words(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", tokenizer__ggml__pre="llama-bpe", tokenizer__ggml__merges=["a b"])
    tokenizer = load_model(str(path)).tokenizer
    assert tokenizer.bos_id == 0
    assert tokenizer.encode("abc") == [41], "a piece that is a token needs no merge"


def test_an_unsupported_architecture_is_named_at_once(tmp_path):
    tokens = [f"t{i}" for i in range(300_000)]
    path = write_gguf(tmp_path / "x.gguf", "falcon", tokenizer__ggml__tokens=tokens)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"unknown general\.architecture 'falcon'"):
        load_model(str(path))
    assert time.monotonic() - start < 3


def test_tensors_are_checked_under_the_users_file(tmp_path):
    whole = random_tensors()
    wrong = [
        ({name: values for name, values in whole.items() if name != "output_norm.weight"}, "lacks model.norm.weight"),
        (whole | {"blk.0.ffn_norm.weight": np.zeros(5, np.float32)}, "has shape"),
        (whole | {"blk.0.odd.weight": np.zeros(HIDDEN, np.float32)}, "blk.0.odd.weight"),
        (whole | {"blk.0.ffn_down.weight": np.zeros((HIDDEN, 32), np.int8)}, "type I8"),
        (whole | {"blk.0.ffn_norm.weight": np.full(HIDDEN, np.nan, np.float32)}, "not finite"),
    ]
    for number, (tensors, message) in enumerate(wrong):
        path = write_gguf(tmp_path / f"{number}.gguf", tensors=tensors)
        with pytest.raises(UserError, match=message) as caught:
            load_model(str(path))
        assert str(path) in str(caught.value)


def test_a_name_with_a_line_end_stays_on_one_line(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", **{"llama__odd\nkey\x1b": 1})
    with pytest.raises(UserError, match=r"llama\.odd\\nkey\\x1b") as caught:
        resolve_shape(str(path))
    assert str(caught.value).isprintable()


def test_errors_name_the_users_file_and_not_the_cache(tmp_path, cache):
    tensors = random_tensors()
    tensors["output_norm.weight"][0] = 1e30  # finite in fp32 alone
    path = write_gguf(tmp_path / "x.gguf", tensors=tensors)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite") as caught:
        load_model(str(path), dtype=torch.float16)
    assert str(path) in str(caught.value)
    assert str(cache) not in str(caught.value)


def test_what_a_killed_conversion_left_is_removed(tmp_path, cache):
    path = write_gguf(tmp_path / "x.gguf")
    folder = converted_folder(file_sha256(path))
    left = folder.with_name(f".{folder.name}.abc.tmp")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    load_model(str(path))
    assert not left.exists()


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"x\.gguf is a Git LFS pointer"):
        resolve_shape(str(tmp_path / "x.gguf"))


def split(tmp_path, second=True, again=()):
    """The two parts of a model; the second holds some tensors of the first again."""
    tensors = random_tensors()
    names = list(tensors)
    first = tmp_path / "x-00001-of-00002.gguf"
    both = {"split__count": 2, "split__tensors__count": len(names)}
    write_gguf(first, tensors={name: tensors[name] for name in names[:6]}, split__no=0, **both)
    if second:
        rest = {name: tensors[name] for name in (*names[6:], *again)}
        write_gguf(tmp_path / "x-00002-of-00002.gguf", tensors=rest, split__no=1, **both)
    return first


def test_parts_are_read_as_one(tmp_path):
    first = split(tmp_path)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        whole = load_model(str(write_gguf(tmp_path / "whole.gguf"))).decoder(ids)
        assert torch.equal(load_model(str(first)).decoder(ids), whole)
    with pytest.raises(UserError, match=r"one of 2 parts .*: give the first one, .*-00001-of-00002\.gguf"):
        resolve_shape(str(tmp_path / "x-00002-of-00002.gguf"))


def test_a_tensor_of_two_parts_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"x-00002-of-00002\.gguf: the tensor token_embd\.weight stands in an earlier part"
    ):
        resolve_shape(str(split(tmp_path, again=["token_embd.weight"])))


def test_an_absent_part_is_named(tmp_path):
    with pytest.raises(UserError, match=r"part 1 of 2, and x-00002-of-00002\.gguf must lie beside it"):
        resolve_shape(str(split(tmp_path, second=False)))


def test_every_cut_is_one_line(tmp_path):
    data = write_gguf(tmp_path / "x.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(data), 499)]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            load_model(str(path))


def test_flipped_bytes_end_in_one_line_or_a_model(tmp_path):
    data = write_gguf(tmp_path / "x.gguf").read_bytes()
    draw = np.random.default_rng(0)
    path = tmp_path / "odd.gguf"
    for _ in range(300):
        odd = bytearray(data)
        for position in draw.integers(0, 2500, 2):
            odd[position] = draw.integers(0, 256)
        path.write_bytes(odd)
        with suppress(UserError):
            resolve_shape(str(path))
