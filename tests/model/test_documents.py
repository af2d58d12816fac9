"""Packed documents know nothing of each other: every kind gives for each what it gives for the document alone."""

import pytest
import torch
from mixer_cases import SHAPES, build, chunk, inputs, learners, whole
from nasbench_kernels.conv import naive_short_conv, short_conv
from tolerances import BF16, CHUNKED_FP32, GRADIENT_FP32, relative_rmse

from nasbench.model import documents as module
from nasbench.model.documents import Documents

LENGTHS = ((1, 2, 9, 40, 1, 3, 8), (50, 14))
"""Documents of two rows of 64 tokens: single tokens, some shorter than a convolution, some longer than a chunk."""
TOKENS = 64


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def packed(lengths=LENGTHS):
    return Documents(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]))


def pieces(lengths=LENGTHS):
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            yield row, slice(start, start + size)
            start += size


def gradients(mixer, x):
    return {"input": x.grad, **{name: parameter.grad for name, parameter in mixer.named_parameters()}}


@pytest.mark.parametrize("shape", ["gqa", "one-kv"])
@pytest.mark.parametrize("name", learners())
@pytest.mark.parametrize("block", [1024, 24])
def test_packed_documents_are_the_documents_alone(name, shape, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    mixer = build(name, SHAPES[shape])
    assert mixer.supports_packed_documents
    x = inputs(mixer.spec, 2, TOKENS).requires_grad_()
    weights = torch.randn(2, TOKENS, x.shape[-1], generator=torch.Generator().manual_seed(7))
    where = chunk(0, TOKENS, documents=packed())
    got = mixer(x, where)
    (got * weights).sum().backward()
    together = {label: tensor.clone() for label, tensor in gradients(mixer, x).items()}
    mixer.zero_grad()
    x.grad = None
    for row, part in pieces():
        alone = whole(mixer, x[row : row + 1, part])
        assert relative_rmse(got[row, part], alone[0]) < CHUNKED_FP32, (row, part)
        (alone[0] * weights[row, part]).sum().backward()
    for label, expected in gradients(mixer, x).items():
        # W1 sees one key, whose softmax is 1 whatever query and key are.
        if name != "W1" or not label.startswith(("q_", "k_")):
            assert relative_rmse(together[label], expected) < GRADIENT_FP32, label


@pytest.mark.parametrize("name", learners())
@torch.no_grad()
def test_one_document_is_a_row_without_boundaries(name):
    mixer = build(name)
    x = inputs(mixer.spec, 2, TOKENS)
    where = chunk(0, TOKENS, documents=packed(((TOKENS,), (TOKENS,))))
    assert relative_rmse(mixer(x, where), whole(mixer, x)) < CHUNKED_FP32


@pytest.mark.parametrize("name", learners())
@torch.no_grad()
def test_no_document_reads_another(name):
    mixer = build(name)
    x = inputs(mixer.spec, 2, TOKENS)
    changed = x.clone()
    changed[0, :52] += 3.0
    where = chunk(0, TOKENS, documents=packed())
    before, after = mixer(x, where), mixer(changed, where)
    assert relative_rmse(after[0, 52:], before[0, 52:]) < 1e-5
    assert relative_rmse(after[0, :52], before[0, :52]) > 1e-3


def test_convolution_with_reach_equals_the_naive_form():
    torch.manual_seed(0)
    x, weight, reach = torch.randn(2, TOKENS, 5), torch.randn(5, 4), packed().reach(4)
    assert relative_rmse(short_conv(x, weight, reach=reach), naive_short_conv(x, weight, reach=reach)) < CHUNKED_FP32


@pytest.mark.gpu
@pytest.mark.parametrize("name", learners())
def test_packed_documents_are_the_documents_alone_on_a_gpu(name):
    """In bf16, by the kernels that a GPU picks for attention with a mask; 1100 tokens are two blocks of queries."""
    lengths = ((1, 300, 799), (1100,), (700, 400))
    mixer = build(name).to("cuda", torch.bfloat16)
    x = inputs(mixer.spec, 3, 1100).to("cuda", torch.bfloat16)

    documents = Documents(packed(lengths).ages.cuda())
    got = mixer(x, chunk(0, 1100, "cuda", documents))
    got.square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in mixer.parameters())
    for row, part in pieces(lengths):
        alone = mixer(x[row : row + 1, part], chunk(0, part.stop - part.start, "cuda"))
        assert relative_rmse(got[row, part], alone[0]) < BF16, (row, part)
