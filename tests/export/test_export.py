"""Exported folders load again and compute the same; what a format cannot say is refused; nothing is half written."""

import json
import subprocess
import sys

import pytest
import torch
from supernet_tiny import LAYERS, save_supernet, save_tiny

from nasbench.checkpoints.families import read_spec
from nasbench.checkpoints.load import LoadedModel, load_model, random_decoder
from nasbench.core.errors import UserError
from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.export import export, write_model
from nasbench.model.shapes import ModelSpec
from nasbench.runs import Run, RunSpec
from nasbench.runtime.generate import generate
from nasbench.spaces.placement import format_placement, parse_placement
from nasbench.supernet.supernet import Supernet

TOKENS = torch.randint(1, 250, (2, 23), generator=torch.Generator().manual_seed(0))


def cli(arguments):
    from nasbench.cli.main import run

    return run(arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a supernet that was never trained, its mixers moved away from where they start."""
    torch.set_num_threads(1)
    model = save_tiny(tmp_path_factory.mktemp("model") / "tiny")
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", RunSpec(str(model), ("A", "W8", "J", "G"), LAYERS))
    net = Supernet(load_model(str(model)), run.spec.space)
    torch.manual_seed(3)
    with torch.no_grad():
        for mixer in net.trained().values():
            for parameter in mixer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_supernet(net, run.supernet)
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("format", "placement"), [("hf", "4A"), ("hf", "J A W8 G"), ("jet-nemotron", "J A W8 J"), ("jet-nemotron", "4A")]
)
def test_an_exported_folder_computes_the_same(run, tmp_path, format, placement, dtype):
    layers = parse_placement(placement)
    out = export(run, layers, tmp_path / "out", format, dtype=dtype)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "nasbench.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    # A temporary file is its owner's alone; what is exported is not.
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    loaded = load_model(str(out), dtype=dtype)
    assert [config.kind for config in loaded.shape.mixers(loaded.decoder.placement)] == [name[0] for name in layers]
    with torch.no_grad():
        expected = Supernet.load(run, dtype=dtype).select(layers)(TOKENS)
        assert torch.equal(loaded.decoder(TOKENS), expected)
    assert json.loads((out / "nasbench.json").read_text())["placement"] == format_placement(layers)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("placement", "model_type"),
    [("4A", "llama"), ("4W8", "mistral"), ("A W8 A W8", "qwen2"), ("J A W8 G", "nasbench")],
)
def test_transformers_loads_every_placement(run, tmp_path, placement, model_type):
    """In a format that it has where one can say the placement, else by our class: logits, greedy text, token ids."""
    transformers = pytest.importorskip("transformers")
    from tolerances import LOGITS_FP32, relative_rmse

    layers = parse_placement(placement)
    out = export(run, layers, tmp_path / "out", "hf", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert (model.config.model_type, model.dtype) == (model_type, torch.float32)
    decoder = Supernet.load(run).select(layers)
    with torch.no_grad():
        assert relative_rmse(model(TOKENS).logits, decoder(TOKENS)) <= LOGITS_FP32
        # The folder's own end token ends some texts; the rest is padded.
        written = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=9, do_sample=False)
    expected = generate(decoder, TOKENS.tolist(), max_new_tokens=9, eos_ids=(0,))
    assert [
        row[: len(own)] for row, own in zip(written[:, TOKENS.shape[1] :].tolist(), expected, strict=True)
    ] == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc")["input_ids"] == Supernet.load(run).tokenizer.encode("abc")
    assert torch.equal(load_model(str(out)).decoder(TOKENS).detach(), decoder(TOKENS).detach())


def test_the_model_class_of_transformers(run, tmp_path):
    """Contexts padded on the left, loss and gradients, samples, beams, bf16, and saved again."""
    transformers = pytest.importorskip("transformers")
    layers = parse_placement("J A W8 G")
    out = export(run, layers, tmp_path / "out", "hf", dtype=torch.float32)
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 254]}))
    model, decoder = transformers.AutoModelForCausalLM.from_pretrained(out), Supernet.load(run).select(layers)
    assert model.generation_config.eos_token_id == [0, 254]
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    rows = [TOKENS[0, 5:].tolist(), TOKENS[1].tolist()]
    written = model.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=255)
    assert written[:, TOKENS.shape[1] :].tolist() == generate(decoder, rows, max_new_tokens=6)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits[0, 5:], decoder(TOKENS[:1, 5:])[0])
    sampled = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (6, TOKENS.shape[1] + 4)
    assert model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, num_beams=2).shape[0] == 2
    labels = TOKENS.masked_fill(TOKENS < 100, -100)
    loss = model(TOKENS, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(decoder(TOKENS)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    half = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16
    model.config.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert read_spec(config, "again", "config.json").published_placement == "J@4x8x8 A W8 G@4x8x8"


def test_transformers_may_be_imported_first(run, tmp_path):
    pytest.importorskip("transformers")
    out = export(run, parse_placement("J A W8 G"), tmp_path / "out", "hf")
    code = (
        "from transformers.models.auto.configuration_auto import AutoConfig; import nasbench; "
        f"print(AutoConfig.from_pretrained({str(out)!r}).placement)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "J@4x8x8 A W8 G@4x8x8"


def test_another_version_of_transformers_still_imports(monkeypatch, caplog):
    from nasbench.runtime import on_import

    monkeypatch.setattr(on_import, "TABLES", {"json": "nasbench.no_such_module"})
    on_import.watch()
    assert "needs its version 5: No module named 'nasbench.no_such_module'" in caplog.text


def test_a_folder_holds_what_the_base_model_says(run, tmp_path):
    """Chat template, generation settings, licence; of a base folder that has them."""
    base = save_tiny(tmp_path / "base")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": 1})
    )
    (base / "chat_template.jinja").write_text(template)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (base / "LICENSE").write_text("MIT")
    again = Run.create(tmp_path / "run", RunSpec(str(base), ("A", "W8"), LAYERS))
    save_supernet(Supernet(load_model(str(base)), again.spec.space), again.supernet)
    out = export(again, parse_placement("2A 2W8"), tmp_path / "out")
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert (tokenizer["chat_template"], "auto_map" in tokenizer) == (template, False)
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, 0)
    assert (out / "LICENSE").read_text() == "MIT"
    assert "license: mit" in (out / "README.md").read_text()


def test_the_card_has_the_placement_and_what_was_measured(run, tmp_path, caplog):
    layers = parse_placement("J A W8 J")
    version = Supernet.load(run).version
    key = ScoreKey(version, "J A W8 J", "loss", "test/4x32/ab", "float32")
    searched = ScoreKey(version, "J A W8 J", "kl", "search/4x32/ab", "float32")
    scores = Scores.of([1.25, 1.75], "nats", False)
    ScoreStore(run.scores).put({key: scores, searched: scores})
    card = (export(run, layers, tmp_path / "out", "jet-nemotron") / "README.md").read_text()
    assert "| loss | nats | 1.5000 | 0.2500 | 2 | test/4x32/ab, float32 |" in card
    assert "search/" not in card
    assert run.spec.model not in card
    for part in ("`J A W8 J`", "# tiny: ", "never finalised", "sglang.launch_server", "not tried", version):
        assert part in card
    assert "J A W8 J was never finalised" in caplog.text
    caplog.clear()
    plain = (export(run, run.spec.space.original, tmp_path / "plain") / "README.md").read_text()
    assert "never finalised" not in plain + caplog.text
    assert "import nasbench" not in plain


def test_jet_nemotron_layout(run, tmp_path):
    """layer_types and tensor names of the published format; biases that the family lacks are zeros."""
    from safetensors.torch import load_file

    out = export(run, parse_placement("J A W8 J"), tmp_path / "out", "jet-nemotron")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["JetNemotronForCausalLM"]
    assert config["layer_types"] == ["jet", "attn", "swa", "jet"]
    assert config["efficient_attention_config"]["swa"]["window_size"] == 8
    assert config["torch_dtype"] == "bfloat16"
    tensors = load_file(out / "model.safetensors")
    assert config["efficient_attention_config"]["jet"]["norm_eps"] == "1e-5"
    assert (config["use_sliding_window"], config["max_window_layers"], config["rope_scaling"]) == (False, 4, None)
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_jet_nemotron.JetNemotronForCausalLM"
    names = {name.removeprefix("model.layers.0.self_attn.") for name in tensors if ".layers.0.self_attn." in name}
    assert names == {
        *(f"{name}_proj.weight" for name in "qkvbago"), "A_log", "dt_bias", "o_norm.weight",
        *(f"dynamic_conv1d.kernel_generator.{name}" for name in ("w1.weight", "w2.weight", "w2.bias")),
    }  # fmt: skip
    for layer in (1, 2):
        for name in "qkv":
            assert not tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"].any()
    assert tensors["model.layers.0.self_attn.A_log"].dtype == torch.float32


def test_a_kind_that_the_format_lacks_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="no layer kind G: it has A, W and J"):
        export(run, parse_placement("G A W8 J"), tmp_path / "out", "jet-nemotron")
    with pytest.raises(UserError, match="did you mean 'hf'"):
        export(run, parse_placement("4A"), tmp_path / "out", "hff")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(run, parse_placement("4A"), out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="not empty"):
        export(run, parse_placement("4A"), out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    from nasbench.export import folder as module

    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_tensors", fail)
    with pytest.raises(Exception, match="no space left on the disk"):
        export(run, parse_placement("4A"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--placement", "5A"], "has 5 layers, the model has 4"),
        (["--placement", "3A Q"], "Q"),
        (["--placement", "3A W16"], "layer kind at layer 3 'W16'"),
        (["--placement", "4A", "--format", "gguf"], "unknown export format 'gguf'"),
        (["--placement", "4A", "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    assert cli(["export", str(run.path), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_prints_the_folder(run, tmp_path, capsys):
    out = tmp_path / "a" / "out"
    assert cli(["export", str(run.path), "--placement", "J A 2W8", "--out", str(out), "--format", "jet-nemotron"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert (out / "config.json").is_file()


FAMILIES = {
    "gemma3_text": {
        "published_placement": "W9 A W9 A", "defaults": (("W", "9"),), "post_norms": True, "embedding_scale": 32**0.5,
        "activation": "gelu_tanh", "qk_norm": True, "window_rope_theta": 500.0,
    },
    "qwen3_moe": {"ffn": ("moe@4x2x24",) * LAYERS, "qk_norm": True},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_hybrid_of_a_family_with_names_of_its_own_computes_the_same(tmp_path, family):
    spec = ModelSpec("tiny", family, LAYERS, 32, 48, 4, 2, 8, 256, 512, 10_000.0, 1e-6, **FAMILIES[family])
    decoder = random_decoder(spec, parse_placement("J A W9 A" if "W" in spec.published_placement else "J 3A"))
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokenizer = load_model(str(save_tiny(tmp_path / "tiny"))).tokenizer
    out = write_model(LoadedModel(decoder, tokenizer, spec, "a test"), tmp_path / "out", "hf", {})
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("nasbench", family)
    with torch.no_grad():
        assert torch.equal(load_model(str(out)).decoder(TOKENS), decoder(TOKENS))
