"""Many texts read at once give what each gives alone, and what is laid out once stays the same for every decoder."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.data.packing import Corpus
from nasbench.evaluation import reading, retrieval
from nasbench.evaluation.reading import Ends, Text, batches_of, end_places, padded, read_alone
from nasbench.evaluation.suite import Choices, tokenised
from nasbench.evaluation.tasks import Context, parse_task
from nasbench.spaces.placement import parse_placement

CPU = torch.device("cpu")


@pytest.fixture
def context(tiny_model, text_file):
    loaded = load_model(str(tiny_model))
    return Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), loaded.decoder)


def lively(shape, seed=3):
    """A random decoder whose greedy text does not stand still."""
    decoder = random_decoder(shape, parse_placement("A J W8 J"), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.25)
    return decoder


def some(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def samples(task, decoder, context):
    return task.measures(decoder, context)[task.title].tolist()


def read_ends(decoder, ends):
    return [values.numpy() for values in read_alone(decoder, ends).values()]


def test_batches_are_as_large_as_fits():
    lengths = [1, 1, 2, 3, 3, 9, 10]
    assert [(part.start, part.stop) for part in batches_of(lengths, 9)] == [(0, 3), (3, 5), (5, 6), (6, 7)]
    assert list(batches_of(lengths[:0], 9)) == []
    assert list(batches_of(lengths, 1000)) == [slice(0, 7)]


def test_ends_of_padded_rows():
    assert padded([[3], [4, 5, 6], [7, 8]]).tolist() == [[3, 0, 0], [4, 5, 6], [7, 8, 0]]
    row, place = end_places(torch.tensor([1, 3, 5, 2]), torch.tensor([1, 2, 0, 2]))
    assert row.tolist() == [0, 1, 1, 3, 3]
    assert place.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("tokens", [None, 1, 100])
def test_ends_are_what_each_text_gives_alone(context, tokens):
    """Of all lengths, one longer than the context, one whose end is longer than the text, one of a single token."""
    decoder = lively(replace(context.teacher.shape, max_context=64))
    sizes = [(9, 3), (63, 1), (64, 5), (90, 7), (2, 1), (1, 1), (5, 5), (9, 0)]
    texts = [Text(ids, count) for ids, (_, count) in zip(some([n for n, _ in sizes]), sizes, strict=True)]
    ends = Ends(texts, 64, CPU, tokens)
    log_p, right = read_ends(decoder, ends)
    assert ends.counts.tolist() == [3, 1, 5, 7, 1, 0, 4, 0]
    sums, wrong = ends.sums(log_p), ends.sums(~right)
    start = 0
    for i, (text, count) in enumerate(zip(texts, ends.counts.tolist(), strict=True)):
        ids = torch.tensor(text.ids[-64:])
        with torch.inference_mode():
            said = F.log_softmax(decoder(ids[None])[0], -1)[len(ids) - count - 1 : -1]
        expected = said.gather(-1, ids[len(ids) - count :, None])[:, 0] if count else torch.empty(0)
        np.testing.assert_allclose(log_p[start : start + count], expected, rtol=1e-4, atol=1e-5)
        assert sums[i] == pytest.approx(float(expected.sum()), rel=1e-4)
        if count:
            assert right[start : start + count].tolist() == (said.argmax(-1) == ids[-count:]).tolist()
        assert wrong[i] == count - int(right[start : start + count].sum())
        start += count
    assert start == len(log_p) == len(right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reads_what_a_cpu_does(context):
    shape, device = replace(context.teacher.shape, max_context=48), torch.device("cuda")
    decoder = lively(shape)
    other = random_decoder(shape, parse_placement("A J W8 J"), device="cuda")
    other.load_state_dict(decoder.state_dict())
    texts = some([7, 1, 36, 20, 37, 60, 7, 2, 13])
    pairs = [
        read_ends(model, Ends([Text(ids, 4) for ids in texts], 48, where))
        for model, where in ((decoder, CPU), (other, device))
    ]
    np.testing.assert_allclose(pairs[1][0], pairs[0][0], rtol=1e-2, atol=1e-2)
    assert (pairs[1][1] == pairs[0][1]).mean() > 0.9


def test_no_attention_is_planned_for_each_shape(context, monkeypatch):
    decoder, seen = lively(context.teacher.shape), []
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    forward = decoder.hidden_by_layer
    monkeypatch.setattr(
        decoder, "hidden_by_layer", lambda tokens, **kw: (seen.append(enabled()), forward(tokens, **kw))[1]
    )
    before = enabled()
    read_ends(decoder, Ends([Text(ids, 2) for ids in some([9, 4])], 64, CPU, 1))
    assert len(seen) == 2
    assert not any(seen)
    assert enabled() == before


def test_tokens_are_those_of_each_text_alone(context):
    encode = context.tokenizer.encode
    pairs = [("the layer", " holds"), ("the layer", " or not"), ("", "a"), ("x", ""), ("", "")]
    expected = [(encode(first) or [0], encode(first + second)[len(encode(first) or [0]) :]) for first, second in pairs]
    # Behind nothing stands the end-of-text token, and the continuation is tokenised alone.
    expected[2] = ([0], encode("a"))
    assert tokenised(context.tokenizer, pairs) == expected


def test_the_first_of_equally_likely_alternatives_is_chosen(monkeypatch):
    lengths = {"bytes": np.array([1, 2, 1, 1, 1]), "plain": np.ones(5)}
    choices = Choices([([1], [2])] * 5, np.array([2, 3]), lengths, np.array([0, 1]), 64, CPU)
    monkeypatch.setattr(choices, "sums", lambda _: np.array([-4, -6, -1, -1, -2]))
    found = choices.judge(np.empty(0), np.empty(0))
    assert found["bytes"].tolist() == [0, 0]
    assert found["plain"].tolist() == [1, 0]


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 500])
def test_prose_is_rows_one_behind_the_other(size):
    """Row by row from a random place, the first again behind the last."""
    prose = torch.arange(7 * 32).view(7, 32)
    for seed in range(20):
        generator = random.Random(seed)
        first, rows = generator.randrange(7), []
        for i in range(size // 32 + 2):
            rows += prose[(first + i) % 7].tolist()
        start = generator.randrange(32)
        found = retrieval.prose(prose.numpy(), size, random.Random(seed))
        assert found == rows[start : start + size]


def test_a_second_decoder_is_asked_without_tokenising_again(context, tmp_path, monkeypatch):
    (tmp_path / "c.jsonl").write_text('{"query": "the", "choices": ["layer", "state"], "gold": 0}\n')
    (tmp_path / "w.jsonl").write_text('{"query": "the", "answers": ["layer"]}\n')
    tasks = ["agreement@8", "retrieval@100:2", f"mc:{tmp_path}/c.jsonl", f"mc-plain:{tmp_path}/c.jsonl"]
    tasks += [f"suite:{tmp_path}/c.jsonl", f"suite:{tmp_path}/w.jsonl"]
    parsed = [parse_task(text) for text in tasks]
    other = lively(context.teacher.shape)
    expected = [samples(task, other, replace(context, memo={})) for task in parsed]
    for task in parsed:
        samples(task, context.teacher, context)
    for name in ("encode", "encode_batch"):
        monkeypatch.setattr(type(context.tokenizer), name, lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setattr(reading, "padded", lambda *_: pytest.fail("padded again"))
    for task, values in zip(parsed[:5], expected, strict=False):
        assert samples(task, other, context) == values
    monkeypatch.undo()
    assert samples(parsed[5], other, context) == expected[5]
