"""Our decoder against transformers for the same weights, and against itself with caches."""

from pathlib import Path

import pytest
import torch
from families_table import differences
from tiny_models import TINY
from tolerances import CACHE_FP32, LOGITS_FP32, relative_rmse

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.core.errors import UserError
from nasbench.model.shapes import MODELS, ModelSpec

SHAPE = ModelSpec("test", "llama", 4, 32, 48, 4, 2, 8, 97, 64, 1e4, 1e-5, defaults=(("W", "5"),))
HYBRID = ("A", "W", "J", "G")


def tokens(vocab, length, batch=2, seed=0):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name, tiny):
    for how, error in differences(*tiny(name)).items():
        assert error <= LOGITS_FP32, f"{name}, {how}: {error:.2e}"


def test_the_page_of_families_has_every_model_and_passes():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(TINY)
    assert all(float(number) <= LOGITS_FP32 for row in rows for number in row[-2:])


@pytest.mark.parametrize("name", ["llama3-rope", "qwen2-windows", "gemma3"])
def test_greedy_continuation_equals_transformers(name, tiny):
    folder, reference = tiny(name)
    decoder = load_model(str(folder)).decoder
    prompt = tokens(211, 9, batch=1)
    expected = reference.generate(
        prompt, max_new_tokens=50, min_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    cache = decoder.new_cache(1, 64)
    with torch.inference_mode():
        new = decoder(prompt, cache)[:, -1].argmax(-1)
        ids = [int(new)]
        for _ in range(49):
            new = decoder.step(new, cache).argmax(-1)
            ids.append(int(new))
    assert ids == expected[0, 9:].tolist()


def test_state_dict_is_the_checkpoint(tiny):
    folder, reference = tiny("qwen2-tied")
    decoder = load_model(str(folder)).decoder
    published = {name for name in reference.state_dict() if name != "lm_head.weight"}
    assert set(decoder.state_dict()) == published
    assert "lm_head.weight" in load_model(str(tiny("qwen2-untied")[0])).decoder.state_dict()


@pytest.mark.parametrize("sizes", [(23,), (1, 22), (7, 1, 11, 4), (1,) * 23])
def test_chunks_and_steps_equal_the_whole(sizes):
    decoder = random_decoder(SHAPE, HYBRID, seed=1)
    ids = tokens(97, 23)
    with torch.inference_mode():
        whole = decoder(ids)
        cache = decoder.new_cache(2, 23)
        chunks = torch.cat([decoder(part, cache) for part in ids.split(sizes, 1)], 1)
        assert cache.length == 23
        cache.reset()
        stepped = torch.stack([decoder.step(ids[:, i], cache) for i in range(23)], 1)
        for value, how in ((chunks, "chunks"), (stepped, "steps")):
            assert relative_rmse(value, whole) <= CACHE_FP32, how


def test_step_at_takes_every_sequence_at_its_own_position():
    decoder = random_decoder(SHAPE, HYBRID, seed=2)
    ids = tokens(97, 20)
    lengths = (6, 13)
    with torch.inference_mode():
        single = []
        caches = []
        for row, length in enumerate(lengths):
            cache = decoder.new_cache(1, 20)
            decoder(ids[row : row + 1, :length], cache)
            caches.append(cache)
        joined = decoder.new_cache(2, 20)
        for together, *alone in zip(joined.kept, *(cache.kept for cache in caches), strict=True):
            for part in ("state", "conv_state"):
                for name, tensor in getattr(together, part).items():
                    tensor.copy_(torch.cat([getattr(one, part)[name] for one in alone]))
        new = ids[:, 19]
        for row, cache in enumerate(caches):
            single.append(decoder.step(new[row : row + 1], cache))
        both = decoder.step_at(new, torch.tensor(lengths), joined)
    assert relative_rmse(both, torch.cat(single)) <= CACHE_FP32


def test_cache_bytes_are_the_formula():
    decoder = random_decoder(SHAPE, HYBRID, dtype=torch.bfloat16)
    cache = decoder.new_cache(3, 50)
    assert cache.nbytes == SHAPE.cache_bytes(HYBRID, 3, 50)
    assert cache.conv_state_nbytes == SHAPE.conv_state_bytes(HYBRID, 3)


def test_parameters_are_the_formula():
    decoder = random_decoder(SHAPE, HYBRID)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == SHAPE.parameters(HYBRID)
    assert MODELS["smollm2-135m"].parameters() == 134_515_008


def test_with_mixers_shares_every_other_module():
    decoder = random_decoder(SHAPE, ("A",) * 4)
    other = random_decoder(SHAPE, HYBRID, seed=3)
    hybrid = decoder.with_mixers(other.mixers, HYBRID)
    assert hybrid.placement == HYBRID
    assert hybrid.layers[2].mlp is decoder.layers[2].mlp
    assert hybrid.layers[2].self_attn is other.layers[2].self_attn
    assert hybrid.model.embed_tokens.weight is decoder.model.embed_tokens.weight
    assert decoder.placement == ("A",) * 4
    assert decoder.layers[2].self_attn is not hybrid.layers[2].self_attn
    assert not hybrid.training


def test_context_is_enforced():
    decoder = random_decoder(SHAPE, ("A",) * 4)
    with pytest.raises(UserError, match=r"context 65 is beyond test's: choose 1 to 64"):
        decoder.new_cache(1, 65)
    with pytest.raises(UserError, match="context 65"):
        decoder(tokens(97, 65))
    cache = decoder.new_cache(1, 8)
    decoder(tokens(97, 8, batch=1), cache)
    with pytest.raises(UserError, match="9 tokens do not fit in a cache of 8"):
        decoder.step(torch.tensor([1]), cache)


def test_gradients_reach_every_parameter_after_inference():
    decoder = random_decoder(SHAPE, HYBRID)
    with torch.inference_mode():
        decoder(tokens(97, 9))  # rotary tables made here must serve training too
    decoder(tokens(97, 9)).logsumexp(-1).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name


def test_random_decoder_is_reproducible_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = random_decoder(SHAPE, HYBRID, dtype=torch.bfloat16, seed=9)
    assert torch.equal(torch.rand(1), expected)
    second = random_decoder(SHAPE, HYBRID, dtype=torch.bfloat16, seed=9)
    for (name, one), (_, two) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert first.dtype == torch.bfloat16
    assert first.layers[2].self_attn.A_log.dtype == torch.float32
