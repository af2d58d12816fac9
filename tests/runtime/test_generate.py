"""Generation: chunked prefill, sampling, end of text, prompts of several lengths."""

from types import SimpleNamespace

import pytest
import torch

from nasbench.checkpoints.load import random_decoder
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.model.shapes import ModelSpec
from nasbench.runtime import generate as generate_module
from nasbench.runtime import graph as graph_module
from nasbench.runtime.generate import cache_rows, generate, prefill, prefill_each, stream
from nasbench.runtime.graph import WARM_UP, Stepper, Writer
from nasbench.runtime.sampling import Sampling, choose

SHAPE = ModelSpec("test", "llama", 4, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))
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


@pytest.mark.parametrize("placement", ["AAAA", "WWWW", "JJJJ", "GGGG", "GWJA"])
def test_prompts_of_any_lengths_are_one_batch(placement, monkeypatch):
    """Shorter and longer than the window, several of one length, not in the order of their lengths."""
    decoder = random_decoder(SHAPE, tuple(placement), seed=5)
    prompts = [list(range(start, start + length)) for start, length in ((3, 9), (50, 2), (20, 17), (7, 2), (60, 1))]
    alone = [generate(decoder, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    caches = []
    new_cache = decoder.new_cache
    monkeypatch.setattr(decoder, "new_cache", lambda *size: caches.append(size) or new_cache(*size))
    assert generate(decoder, prompts, max_new_tokens=20, chunk=4) == alone
    assert caches == [(5, 17 + 20 - 1)]
    streamed = [tokens.tolist() for tokens in stream(decoder, prompts, max_new_tokens=20)]
    assert [list(row) for row in zip(*streamed, strict=True)] == alone


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


@pytest.mark.parametrize("look_every", [1, 4, 100])
def test_each_sequence_ends_for_itself(decoder, monkeypatch, look_every):
    """Whatever is written behind the end, and however rarely it is looked at."""
    monkeypatch.setattr(generate_module, "LOOK_EVERY", ByDevice(cpu=look_every))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [1]]
    free = generate(decoder, prompts, max_new_tokens=12)
    ends = {free[0][4], free[1][1]}
    wanted = [text[: next((i for i, token in enumerate(text) if token in ends), 12)] for text in free]
    assert len(wanted[1]) <= 1
    assert generate(decoder, prompts, max_new_tokens=12, eos_ids=ends) == wanted


def test_no_step_after_all_have_ended(decoder, monkeypatch):
    prompts = [[5, 6, 7], [9, 8]]
    free = generate(decoder, prompts, max_new_tokens=12)
    steps = []
    step = Writer.step
    monkeypatch.setattr(Writer, "step", lambda self: steps.append(1) or step(self))
    monkeypatch.setattr(generate_module, "LOOK_EVERY", ByDevice(cpu=1))
    generate(decoder, prompts, max_new_tokens=12, eos_ids={free[0][0], free[1][2]})
    assert len(steps) <= 2


def test_sampling_repeats_with_its_seed(decoder):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    first = generate(decoder, [[1, 2]], seed=1, **options)
    assert first == generate(decoder, [[1, 2]], seed=1, **options)
    assert first != generate(decoder, [[1, 2]], seed=2, **options)


@pytest.mark.parametrize("prompts", [[[1, 2]] * 3, [[1, 2, 3], [4], [5, 6]]])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_samples_depend_on_the_seed_alone(decoder, prompts, options):
    def sampled(seed):
        return generate(decoder, prompts, max_new_tokens=16, seed=seed, **options)

    first = sampled(1)
    torch.manual_seed(99)  # of the default generator, which is another
    torch.rand(5, device=decoder.device)
    assert first == sampled(1)
    assert first != sampled(2)
    assert len({tuple(text) for text in first}) == 3  # every sequence draws its own numbers
    assert all(len(set(text)) > 4 for text in first)  # and every step


def test_sampled_steps_follow_the_distribution(decoder):
    """Second tokens of many equal prompts, drawn in the step, a captured one on a GPU: as often as the model says."""
    rows = 4000
    first, second = stream(decoder, torch.tensor([[1, 2, 3]] * rows), max_new_tokens=2, temperature=0.1)
    del first  # a buffer, which the second step wrote to
    cache = decoder.new_cache(1, 4)
    with torch.inference_mode():
        before = (prefill(decoder, torch.tensor([[1, 2, 3]], device=decoder.device), cache)[0] / 0.1).softmax(-1)
        texts = torch.tensor([[1, 2, 3, token] for token in range(97)], device=decoder.device)
        after = (decoder(texts)[:, -1] / 0.1).softmax(-1)
    shares = torch.bincount(second, minlength=97) / rows
    wanted = before @ after
    assert (shares - wanted).abs().sum() < 0.2 < (wanted - 1 / 97).abs().sum()


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


def test_rows_of_a_cache_are_written_and_no_others(decoder):
    cache, single = decoder.new_cache(4, 20), decoder.new_cache(1, 20)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    rows = cache_rows(cache, slice(1, 3))
    logits = prefill(decoder, tokens, rows, 4)
    assert (rows.batch, rows.length, cache.length) == (2, 9, 0)
    alone = prefill(decoder, tokens[:1], single, 4)
    torch.testing.assert_close(logits[:1], alone, rtol=1e-3, atol=1e-4)
    for mixer, other in zip(cache.kept, single.kept, strict=True):
        for name, tensor in mixer.tensors.items():
            assert not tensor[[0, 3]].any()
            torch.testing.assert_close(tensor[1], other.tensors[name][0], rtol=1e-3, atol=1e-4)


def test_a_writer_and_a_stepper_say_the_same(decoder):
    prompt = torch.tensor([4, 5, 6, 7])
    caches = [decoder.new_cache(1, 12) for _ in range(2)]
    writer, stepper = Writer(decoder, caches[0], Sampling()), Stepper(decoder, caches[1])
    tokens = writer.begin(prefill_each(decoder, [prompt], caches[0]), [4]).clone()
    prefill(decoder, prompt[None].to(decoder.device), caches[1])
    for _ in range(8):
        wanted = stepper.step(tokens).argmax(-1)
        tokens = writer.step().clone()
        assert tokens.tolist() == wanted.tolist()
    assert caches[0].length == caches[1].length == 12
    with pytest.raises(UserError, match="13 tokens do not fit"):
        writer.step()
    for made_late in (lambda: Writer(decoder, caches[0], Sampling()), lambda: Stepper(decoder, caches[1])):
        with pytest.raises(ValueError, match="before the prompt"):
            made_late()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_graph_replays_is_the_step(monkeypatch, temperature):
    """On a CPU, with a recording that runs the work at every replay, after the warm-up of a capture."""

    def record(work, generator=None):
        for _ in range(WARM_UP + 1):
            work()
        return SimpleNamespace(replay=work)

    decoder = random_decoder(SHAPE, PLACEMENT, seed=3)
    prompts, options = [[5, 6, 7], [9, 8], [1] * 12], {"max_new_tokens": 9, "temperature": temperature, "seed": 4}
    wanted = generate(decoder, prompts, **options)
    made = Writer.__init__

    def captured(self, *arguments):
        made(self, *arguments)
        self._capture()
        self.generator.manual_seed(self.sampling.seed)

    monkeypatch.setattr(graph_module, "capture", record)
    monkeypatch.setattr(Writer, "__init__", captured)
    assert generate(decoder, prompts, **options) == wanted


def test_nothing_to_write(decoder):
    assert generate(decoder, [], max_new_tokens=3) == []


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
