"""What a decode step does in one launch against the launches it replaces: on a GPU, or else under the interpreter."""

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

# ruff: noqa: E402
from nasbench_kernels.gated_delta.decode import StepLaunch
from nasbench_kernels.gated_delta.naive import RowLayout
from nasbench_kernels.ops import StepForm, StepWorkspace, conv_step, grouped_gemm, recurrent_step
from tolerances import relative_rmse

DEVICE = "cuda" if GPU else "cpu"
CLOSE = 1e-5
HEADS, KEY, VALUE = 3, 24, 40
KEYS, VALUES = HEADS * KEY, HEADS * VALUE
LAYOUT = RowLayout(0, KEYS, 2 * KEYS, 2 * KEYS + VALUES, 2 * KEYS + 2 * VALUES, 2 * KEYS + 2 * VALUES + HEADS)


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(DEVICE)


@pytest.mark.parametrize(
    ("batch", "columns", "sizes"), [(1, 64, (32, 48)), (5, 72, (40, 8, 100)), (130, 64, (16, 160)), (20, 1024, (32, 5))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_several_inputs(batch, columns, sizes, bias):
    dtype = torch.bfloat16 if GPU else torch.float32
    x = draw(len(sizes), batch, columns).to(dtype)
    weight, shift = draw(sum(sizes), columns).to(dtype), draw(sizes[-1]).to(dtype) if bias else None
    wanted = [part.float() @ own.float().mT for part, own in zip(x, weight.split(sizes), strict=True)]
    if shift is not None:
        wanted[-1] += shift.float()
    bound = 8e-3 if GPU else CLOSE
    apart = grouped_gemm(x[0], x.stride(0), weight, sizes, shift)
    beside = grouped_gemm(x.transpose(0, 1).flatten(1)[:, :columns], columns, weight, sizes, shift)
    for given in (apart, beside):
        assert relative_rmse(given.float(), torch.cat(wanted, 1)) < bound


@pytest.mark.parametrize("launch", [StepLaunch(32, 2, 1, 1, 2), StepLaunch(64, 1, 1, 2, 1), StepLaunch(16, 2, 2, 1, 1)])
def test_static_convolutions_inside_the_step(launch):
    row, taps = draw(2, LAYOUT.beta + HEADS), draw(2 * KEYS + VALUES, 4)
    further = draw(HEADS), draw(HEADS, seed=1), draw(VALUE)
    states = [draw(2, HEADS, KEY, VALUE) for _ in range(2)]
    windows = [draw(2, 3, len(taps)) for _ in range(2)]
    for _ in range(2):
        convolved = row.clone()
        conv_step(convolved, taps, windows[0])
        wanted = recurrent_step(convolved, LAYOUT, states[0], *further, StepWorkspace())
        given = recurrent_step(
            row.clone(), LAYOUT, states[1], *further, StepWorkspace(), taps, windows[1], launch=launch
        )
        assert relative_rmse(given, wanted) < CLOSE
        assert relative_rmse(states[1], states[0]) < CLOSE
        assert torch.equal(windows[1], windows[0])


def test_a_narrow_product_inside_the_step():
    row, weight, bias = draw(2, LAYOUT.beta + HEADS), draw(KEYS, 16), draw(KEYS)
    further = draw(HEADS), draw(KEYS, seed=1), draw(VALUE)
    states, form = [draw(2, HEADS, KEY, VALUE) for _ in range(2)], StepForm(False, False, -1.0)
    middle = row[:, :16]
    decay = torch.nn.functional.linear(middle, weight, bias)
    wanted = recurrent_step(row, LAYOUT, states[0], *further, StepWorkspace(), form=form, decay=decay)
    given = recurrent_step(
        row, LAYOUT, states[1], *further, StepWorkspace(), form=form, decay=middle, decay_product=(weight, bias)
    )
    assert relative_rmse(given, wanted) < CLOSE
    assert relative_rmse(states[1], states[0]) < CLOSE
