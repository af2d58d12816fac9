"""Data types, constants by device, provenance."""

import subprocess
import sys

import pytest
import torch

from nasbench.core.by_device import ByDevice
from nasbench.core.dtypes import DTYPES, dtype_bytes, dtype_name, torch_dtype
from nasbench.core.errors import UserError
from nasbench.core.files import strict_json
from nasbench.core.provenance import provenance


@pytest.mark.parametrize("name", DTYPES)
def test_names_of_data_types(name):
    assert dtype_name(torch_dtype(name)) == name
    assert torch_dtype(name).itemsize == dtype_bytes(name)


def test_unknown_data_types_are_named():
    with pytest.raises(UserError, match="unknown dtype 'fp61': choose from bf16, fp16, fp32; did you mean 'fp16'"):
        torch_dtype("fp61")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        dtype_name(torch.int8)


@pytest.mark.parametrize(
    ("device", "value"),
    [("cpu", 1), ("cuda", 2), ("cuda:1", 2), (torch.device("cuda", 0), 2), ("mps", 1), ("xpu:0", 1)],
)
def test_a_kind_of_device_without_an_own_value_has_the_cpus(device, value):
    assert ByDevice(cpu=1, cuda=2).of(device) == value


def test_provenance_says_what_ran_where():
    found = provenance("dev", "555.1")
    assert (found.device, found.driver, found.torch) == ("dev", "555.1", torch.__version__)
    assert found.threads == torch.get_num_threads()
    assert found.measured_utc.endswith("Z")
    assert found.cells("driver", "project") == {"driver": "555.1", "project": found.project}


def test_provenance_loads_no_torch():
    code = "import sys; from nasbench.core.provenance import provenance; assert provenance().torch"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_is_strict():
    assert (
        strict_json({"a": (1.5, float("nan")), "b": [{"c": float("inf")}]}) == '{"a": [1.5, null], "b": [{"c": null}]}'
    )
