"""The teacher writes its own corpus: readable, reproducible, resumable."""

import json

import pytest

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import UserError
from nasbench.data import self_corpus
from nasbench.data.packing import Corpus
from nasbench.data.self_corpus import SHORTEST, Writing, first_tokens, special_ids, write_batch, write_corpus
from nasbench.data.text import read_documents

WRITING = Writing("tiny", length=48, batch=4)


@pytest.fixture
def loaded(tiny_model):
    return load_model(str(tiny_model))


def test_a_corpus_is_what_distil_reads(loaded, tmp_path):
    path, seen = tmp_path / "self.jsonl", []
    written = write_corpus(loaded, WRITING, 3000, path, lambda *row: seen.append(row))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == sum(row["tokens"] for row in rows) >= 3000
    assert all(SHORTEST <= row["tokens"] <= 48 for row in rows)
    assert seen[-1] == ("corpus", 3000, 3000)
    assert len(set(read_documents(str(path)))) > 0.9 * len(rows)
    assert Corpus.load(str(path), loaded.tokenizer, 32).ages["train"].max() < 32
    assert [file.name for file in tmp_path.iterdir()] == ["self.jsonl"]


def test_batches_are_functions_of_seed_and_number_and_end_where_text_ends(loaded):
    firsts = first_tokens(loaded.tokenizer)
    one = write_batch(loaded, WRITING, 3, firsts)
    assert one == write_batch(loaded, WRITING, 3, firsts) != write_batch(loaded, WRITING, 4, firsts)
    ends = special_ids(loaded.tokenizer)
    assert 0 in ends
    assert not ends & {number for ids in one for number in ids}
    assert {ids[0] for ids in one} <= set(firsts)


def test_a_stopped_writer_goes_on_to_the_same_file(loaded, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    write_corpus(loaded, WRITING, 1500, whole)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return write_batch(*args)

    monkeypatch.setattr(self_corpus, "write_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(loaded, WRITING, 1500, stopped)
    with (tmp_path / ".stopped.jsonl.partial").open("a") as file:
        file.write('{"text": "torn')
    write_corpus(loaded, WRITING, 1500, stopped)
    assert calls[5][2] == 3  # the last whole batch may be torn: it is written again
    assert stopped.read_text() == whole.read_text()


def test_bad_settings_are_one_line(loaded, tmp_path):
    with pytest.raises(UserError, match="choose 16 to 512"):
        write_corpus(loaded, Writing("tiny", length=1024), 100, tmp_path / "a.jsonl")
