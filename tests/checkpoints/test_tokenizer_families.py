"""Ids, texts and conversations of every family's kind of tokenizer equal transformers'."""

import json

import pytest
from tiny_tokenizers import FAMILIES, HARD, save

from nasbench.checkpoints.chat import chat_text
from nasbench.checkpoints.tokenizer import tokenizer_from_json
from nasbench.core.errors import UserError
from nasbench.runtime.generate import until_stop


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    return tokenizer_from_json(folder / "tokenizer.json", ()), transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_and_texts_equal_transformers(both):
    ours, theirs = both
    for text in HARD:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
        if not text.startswith("<s>"):  # theirs then begins twice
            assert ours.encode_prompt(text) == theirs(text).input_ids, repr(text)
    assert ours.encode_batch(HARD) == [ours.encode(text) for text in HARD]


def test_a_prompt_never_has_two_begin_tokens(both):
    ours, _ = both
    if ours.bos_id is not None:
        assert ours.encode_prompt("<s>a").count(ours.bos_id) == 1


CHATML = (
    "{{ bos_token }}{% for message in messages %}\n  {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}{{ '<|im_start|>assistant\n' }}{% endgeneration %}{% endif %}"
    "{{ messages | tojson }}"
)


@pytest.mark.parametrize("place", ["text", "list", "file"])
def test_a_conversation_equals_transformers(tmp_path, place):
    import transformers

    save("llama3", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    else:
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
        config["chat_template"] = CHATML if place == "text" else several
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_from_json(tmp_path / "tokenizer.json", ())
    messages = [{"role": "user", "content": " Grüße <b> "}, {"role": "tool", "content": "x"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat_text(ours, messages) == wanted
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert ours.encode(chat_text(ours, messages)) == ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% if %}", "chat template of this model fails"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'|unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, message):
    save("llama3", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = tokenizer_from_json(tmp_path / "tokenizer.json", ())
    with pytest.raises(UserError, match=message) as caught:
        chat_text(tokenizer, [{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [[], {"chat_template": 5}, {"bos_token": [1]}, {"added_tokens_decoder": {"x": {}}}, {"split_special_tokens": "yes"},
     {"additional_special_tokens": 7}, {"added_tokens_decoder": {"1": {"content": "a", "lstrip": "no"}}}],
)  # fmt: skip
def test_a_broken_tokenizer_config_is_named(tmp_path, config):
    save("llama3", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as caught:
        tokenizer_from_json(tmp_path / "tokenizer.json", ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", ["\n"], ("one two", False)),
        ("one\ntwo", ["\n"], ("one", True)),
        ("one two", ["two", "one"], ("", True)),
        ("say END", ["END."], ("say ", False)),
        ("say EN", ["END", "N!"], ("say ", False)),
        ("anything", [], ("anything", False)),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(text, stops, expected):
    assert until_stop(text, stops) == expected
