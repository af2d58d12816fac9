"""Generation: chunked prefill, sampling, end of text, prompts of several lengths."""

import pytest
import torch

from nasbench.backbone.load import random_decoder
from nasbench.backbone.shapes import ModelShape
from nasbench.engine.generate import choose, generate, prefill, stream
from nasbench.errors import UserError

SHAPE = ModelShape("test", "llama", 4, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))
PLACEMENT = ("A", "W", "J", "G")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def decoder(request):
    return random_decoder(SHAPE, PLACEMENT, device=request.param, seed=3)


def greedy_without_cache(decoder, prompt, count):
    """The truth: the whole text is read again for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(decoder(torch.tensor([ids], device=decoder.device))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_reading_everything_again(decoder):
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [9, 8, 7], [42]]
    new = generate(decoder, prompts, max_new_tokens=12, chunk=4)
    assert new == [greedy_without_cache(decoder, prompt, 12) for prompt in prompts]


def test_chunk_size_does_not_matter(decoder):
    prompts = [list(range(30))]
    results = [generate(decoder, prompts, max_new_tokens=8, chunk=chunk) for chunk in (1, 7, 30, 1000)]
    assert results.count(results[0]) == 4


def test_end_of_text_stops_one_sequence_alone(decoder):
    prompts = [[5, 6, 7], [9, 8, 7]]
    free = generate(decoder, prompts, max_new_tokens=10)
    eos = free[0][2]
    stopped = generate(decoder, prompts, max_new_tokens=10, eos_ids={eos})
    for text, short in zip(free, stopped, strict=True):
        assert short == (text[: text.index(eos)] if eos in text else text)
    assert len(stopped[0]) <= 2


def test_sampling_repeats_with_its_seed(decoder):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    first = generate(decoder, [[1, 2]], seed=1, **options)
    assert first == generate(decoder, [[1, 2]], seed=1, **options)
    assert first != generate(decoder, [[1, 2]], seed=2, **options)


def test_choose_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    shares = torch.bincount(choose(logits, 1.0, 1.0, generator), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)
    nucleus = torch.bincount(choose(logits, 1.0, 0.6, generator), minlength=4) / 20_000
    assert torch.allclose(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015)
    assert choose(logits, 1.0, 1e-6, generator).unique().tolist() == [0]
    assert choose(logits, 0.0, 1.0, None).unique().tolist() == [0]
    cold = torch.bincount(choose(logits, 0.5, 1.0, generator), minlength=4) / 20_000
    assert cold[0] == pytest.approx(0.25 / 0.365, abs=0.015)


def test_prefill_gives_the_last_logits(decoder):
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    with torch.inference_mode():
        whole = decoder(tokens)[:, -1]
    cache = decoder.new_cache(2, 20)
    torch.testing.assert_close(prefill(decoder, tokens, cache, 6), whole, rtol=1e-3, atol=1e-4)
    assert cache.length == 20


def test_the_whole_context_can_be_used_and_no_more(decoder):
    assert len(generate(decoder, [[1] * 60], max_new_tokens=5)[0]) == 5
    with pytest.raises(UserError, match="context 65 is beyond test's"):
        generate(decoder, [[1] * 60], max_new_tokens=6)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([1], {"max_new_tokens": 0}),
        ([1], {"temperature": -1.0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.5}),
    ],
)
def test_bad_options(decoder, prompt, options):
    with pytest.raises(UserError):
        generate(decoder, [prompt], **({"max_new_tokens": 3} | options))


def test_stream_leaves_the_caller_outside_of_inference_mode(decoder):
    for _ in stream(decoder, torch.tensor([[1, 2]]), max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
