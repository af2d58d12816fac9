"""Reading, splitting, tokenising and packing text."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.core.errors import MachineError, UserError
from nasbench.data import text as text_module
from nasbench.data.packing import Batch, Corpus, ages_of, cut, pack, split_documents
from nasbench.data.text import default_documents, read_documents


@pytest.fixture
def tokenizer(tiny_model):
    return load_model(str(tiny_model)).tokenizer


def test_default_corpus_repeats_no_paragraph():
    paragraphs = [part.strip() for text in default_documents() for part in text.split("\n\n") if part.strip()]
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_splits_share_no_piece_and_lose_none():
    documents = default_documents()
    splits = split_documents(documents)
    characters = {name: sum(map(len, pieces)) for name, pieces in splits.items()}
    assert characters["search"] + characters["test"] < 0.3 * sum(characters.values())
    assert min(characters.values()) > 0.05 * sum(characters.values())
    assert not set(splits["train"]) & (set(splits["search"]) | set(splits["test"]))
    assert sum(characters.values()) == sum(map(len, documents))
    assert split_documents(reversed(documents)) == splits


@pytest.mark.parametrize("text", ["", "abc", "line\n" * 9000, "x" * 50_000, "para\n\n" * 5000])
def test_cut_loses_nothing(text):
    pieces = cut(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 12_001


def test_formats_read_alike(tmp_path):
    texts = ["first text", "second\n\ntext"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    assert read_documents(str(tmp_path / "a.jsonl")) == texts
    assert read_documents(str(tmp_path / "b.parquet")) == texts
    for suffix, packer in ((".gz", gzip), (".xz", lzma)):
        (tmp_path / f"c.jsonl{suffix}").write_bytes(packer.compress((tmp_path / "a.jsonl").read_bytes()))
        assert read_documents(str(tmp_path / f"c.jsonl{suffix}")) == texts
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.txt").write_text(texts[0])
    (folder / "y.txt").write_text(texts[1])
    assert read_documents(str(folder)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", ".csv"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": 1}\n', "a.jsonl:2"),
        ("a.jsonl", b"not json\n", "a.jsonl:1"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00bad", "UTF-8"),
        ("a.parquet", b"not parquet", "Parquet"),
        ("a.jsonl.xz", b"not xz", "unpacked"),
        ("a.jsonl.gz", b"not gz", "unpacked"),
        ("a.csv.gz", b"x", "unknown data format"),
    ],
)
def test_bad_data_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_parquet_without_text_names_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'text', only: body"):
        read_documents(str(tmp_path / "a.parquet"))


def test_missing_data():
    with pytest.raises(UserError, match="no such data: nowhere"):
        read_documents("nowhere")


def test_too_little_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("only a few words")
    with pytest.raises(UserError, match="too little text"):
        Corpus.load(str(tmp_path / "a.txt"), tokenizer, 64)


def test_batches_are_epochs_of_permutations(text_file, tokenizer):
    corpus = Corpus.load(str(text_file), tokenizer, 64)
    size, count = 7, len(corpus.train)
    rows = torch.cat([corpus.batch(index, size, seed=3).tokens for index in range(-(-2 * count // size))])
    for epoch in range(2):
        seen = rows[epoch * count : (epoch + 1) * count]
        assert torch.equal(seen.unique(dim=0), corpus.train.unique(dim=0))
    assert not torch.equal(rows[:count], rows[count : 2 * count])
    assert torch.equal(corpus.batch(5, size, seed=3).tokens, rows[5 * size : 6 * size])
    assert not torch.equal(corpus.batch(5, size, seed=4).tokens, rows[5 * size : 6 * size])


def test_token_cache_is_used_and_survives_damage(text_file, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path))
    first = Corpus.load(str(text_file), tokenizer, 64)
    (cached,) = (tmp_path / "tokens").glob("*.safetensors")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:100])
    again = Corpus.load(str(text_file), tokenizer, 64)
    assert torch.equal(first.train, again.train)
    assert cached.read_bytes() == whole


def test_pack_drops_the_remainder():
    assert pack(torch.arange(11, dtype=torch.int32), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_ages_count_from_the_documents_or_rows_beginning():
    starts = torch.tensor([0, 3, 4, 9, 13])
    assert ages_of(starts, 3, 4).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 1, 2]]


def test_rows_know_where_documents_begin(tmp_path, tokenizer):
    texts = [f"document {number} " + "x" * (number % 40) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = Corpus.load(str(tmp_path / "a.jsonl"), tokenizer, 64)
    batch = corpus.batch(1, 5, seed=0)
    for tokens, ages in zip(batch.tokens, batch.ages, strict=True):
        ended = torch.cat((torch.tensor([True]), tokens[:-1] == tokenizer.eos_id))
        assert torch.equal(ages == 0, ended)
    assert torch.equal(corpus.batch(1, 5, seed=0).ages, batch.ages)
    assert corpus.without_documents().batch(1, 5, seed=0).ages is None
    assert torch.equal(corpus.without_documents().held_out("test").tokens, corpus.test)


def test_the_last_token_of_a_document_predicts_nothing():
    batch = Batch(torch.zeros(2, 4).long(), torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    values = torch.tensor([[1.0, 100.0, 3.0], [1.0, 2.0, 6.0]])
    assert batch.per_row(values).tolist() == [2.0, 3.0]
    assert Batch(batch.tokens).per_row(values).tolist() == [pytest.approx(104 / 3), 3.0]


class FakeHub:
    """A file system over a folder, as huggingface_hub's."""

    def __init__(self, root):
        self.root = root
        self.opened = []

    def glob(self, pattern):
        folder = self.root / pattern.split("/**")[0]
        return [str(path.relative_to(self.root)) for path in folder.rglob("*.parquet")]

    def open(self, path, mode):
        self.opened.append(path)
        return (self.root / path).open(mode)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    for name, text in {"data/train-0": "one", "data/train-1": "two", "data/test-0": "three", "valid/0": "four"}.items():
        path = tmp_path / "datasets/org/set" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [text, text + "!"]}), path)
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(text_module, "_file_system", lambda name: fake)
    return fake


def test_hub_data_is_read_as_far_as_asked_and_once(hub):
    assert read_documents("hf:org/set") == ["one", "one!", "two", "two!"]
    assert read_documents("hf:org/set:test") == ["three", "three!"]
    assert read_documents("hf:org/set:valid") == ["four", "four!"]
    assert read_documents("hf:org/set:train:5") == ["one", "one!"]
    hub.opened.clear()
    assert read_documents("hf:org/set") == ["one", "one!", "two", "two!"]
    assert not hub.opened


def test_bad_hub_data_is_one_line(hub, monkeypatch):
    for data, message in [
        ("hf:", "bad hub data set"),
        ("hf:a/b/c", "bad hub data set"),
        ("hf:org/set:train:many", "bad size"),
        ("hf:org/none", "no Parquet files"),
        ("hf:org/set:dev", "no files of split 'dev': the files speak of data, test, train, valid"),
    ]:
        with pytest.raises(UserError, match=message):
            read_documents(data)

    def offline(pattern):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(hub, "glob", offline)
    with pytest.raises(MachineError, match=r"hub data set 'org/set' cannot be read: no route$"):
        read_documents("hf:org/set")
    assert not [path for path in (Path(hub.root) / "cache").rglob("*") if path.is_file()]


def test_tokens_are_the_same_in_batches_and_one_by_one(text_file, tokenizer):
    texts = read_documents(str(text_file))[0].split("\n\n")[:50]
    assert tokenizer.encode_batch(texts) == list(map(tokenizer.encode, texts))


def test_rows_that_repeat_end_with_a_passage_of_their_first_half():
    rows = torch.arange(200 * 64).view(200, 64)
    corpus = Corpus(rows, rows, rows, "f" * 64)
    assert torch.equal(corpus.repeating(0.0).batch(3, 40, 0).tokens, corpus.batch(3, 40, 0).tokens)
    plain, changed = corpus.batch(0, 200, 0).tokens, corpus.repeating(0.5).batch(0, 200, 0).tokens
    assert torch.equal(changed[:, :48], plain[:, :48])
    repeated = [i for i in range(200) if not torch.equal(changed[i], plain[i])]
    assert 70 < len(repeated) < 130
    starts = set()
    for i in repeated:
        start = int(changed[i, 48] - plain[i, 0])
        starts.add(start)
        assert 0 <= start <= 16
        assert torch.equal(changed[i, 48:], plain[i, start : start + 16])
    assert {0, 16} <= starts
    again = corpus.repeating(0.5)
    assert torch.equal(again.batch(0, 200, 0).tokens, changed)
    assert not torch.equal(again.batch(0, 200, 1).tokens.sort(0).values, changed.sort(0).values)
    assert all(
        not torch.equal(row, other)
        for row, other in zip(again.repeating(1.0).batch(0, 200, 0).tokens, plain, strict=True)
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7])
def test_short_rows_repeat_what_they_can(tokens):
    rows = torch.arange(10 * tokens).view(10, tokens)
    assert Corpus(rows, rows, rows, "").repeating(1.0).batch(0, 10, 0).tokens.shape == (10, tokens)
