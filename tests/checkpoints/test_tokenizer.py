"""Tokenizers from vocabularies and from tokenizer.json."""

import json

import pytest
from tiny_models import make_tokenizer

from nasbench.checkpoints.gguf_tokenizer import byte_level_bpe, sentencepiece_bpe
from nasbench.checkpoints.tokenizer import tokenizer_from_json
from nasbench.core.errors import UserError

TOKENS = ["<s>", "</s>", "<tool>", "a", "b", "1", "2", "Ġ", "Ċ", "ab", "12", "ĊĊ"]
KINDS = [3, 3, 4, *[1] * 9]
MERGES = ["a b", "1 2", "Ċ Ċ"]


def ids(pre, text, bos_id=None):
    return byte_level_bpe(TOKENS, KINDS, MERGES, pre, bos_id).encode(text).ids


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "12", [5, 6]),
        ("gpt-2", "12", [10]),
        ("llama-bpe", "12", [10]),
        ("qwen2", "12", [5, 6]),
        ("smollm", "\n\n1", [11, 5]),
        ("gpt-2", "\n\n1", [8, 8, 5]),  # its pattern leaves the last space of a run to what follows
        ("smollm", "ab<s>ab", [9, 0, 9]),
        ("smollm", "ab<tool>ab", [9, 2, 9]),
    ],
)
def test_pre_tokenizers(pre, text, expected):
    assert ids(pre, text) == expected


@pytest.mark.parametrize("bos_id", [None, 0])
def test_begin_of_text_is_what_the_tokenizer_adds(tmp_path, bos_id):
    backend = byte_level_bpe(TOKENS, KINDS, MERGES, "smollm", bos_id)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_json(tmp_path / "tokenizer.json", (1, 2))
    assert tokenizer.bos_id == bos_id
    assert tokenizer.eos_ids == (1, 2)
    assert tokenizer.encode("ab") == [9]
    assert tokenizer.decode([0, 9, 1]) == "ab"


def test_no_end_of_text(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = tokenizer_from_json(tmp_path / "tokenizer.json", ())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (None, None, ())


PIECES = ["<unk>", "<bos>", "<0xC3>", "<0xA9>", "<0x0A>", "▁", "a", "b", "▁a", "ab", "▁ab", "bb"]
PIECE_KINDS = [2, 3, 6, 6, 6, *[1] * 7]
SCORES = [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -0.5]


@pytest.mark.parametrize(
    ("text", "prefix", "expected"),
    [
        ("ab", False, [9]),
        ("ab", True, [10]),
        (" ab", False, [10]),
        ("abb", False, [6, 11]),  # the pair of the higher score goes first, wherever it stands
        ("aé\n", False, [6, 2, 3, 4]),  # bytes of what no token covers
        ("<bos>a", False, [1, 6]),
    ],
)
def test_sentencepiece(text, prefix, expected):
    backend = sentencepiece_bpe(PIECES, PIECE_KINDS, SCORES, prefix, bos_id=1)
    assert backend.encode(text, add_special_tokens=False).ids == expected
    assert backend.decode(expected, skip_special_tokens=True) == text.removeprefix("<bos>")
    assert backend.encode(text).ids == [1, *expected]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                            "pair": [], "special_tokens": {}}),
        ("unk_token", "absent"),
        ("vocab", 5),
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_named(tmp_path, part, value):
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    (content["model"] if part in content["model"] else content)[part] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer") as caught:
        tokenizer_from_json(path, ())
    assert "\n" not in str(caught.value)
