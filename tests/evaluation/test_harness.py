"""The model class of lm-evaluation-harness against the harness's own transformers backend, and its tasks by name."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nasbench.checkpoints.load import load_model, random_decoder
from nasbench.core.errors import UserError
from nasbench.evaluation.prefixes import Group, shared_prefixes
from nasbench.spaces.placement import parse_placement

BLOCK = 32
WORDS = ["layer", "state", "key", "value", "window", "model", "token", "holds", "each", "not"]


def words(generator, count):
    return " ".join(generator.choices(WORDS, k=count))


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module", params=["no BOS", "BOS", "BOS by name"])
def pair(request, tmp_path_factory):
    """(our class, the harness's hf class) over one random llama with a context of 256 tokens."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from nasbench.evaluation.harness_model import HarnessModel

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(request.param == "BOS")
    # A begin-of-text token stands before an empty context even where the tokenizer adds none to a text.
    named = {"bos_token": "<s>"} if request.param != "no BOS" else {}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<e>", **named)
    fast.save_pretrained(folder)
    loaded = load_model(str(folder))
    theirs = HFLM(model.eval(), tokenizer=fast, batch_size=4, device="cpu", dtype="float32", max_length=256)
    return HarnessModel(loaded.decoder, loaded.tokenizer, batch_size=4), theirs


def tiny_tokenizer(bos):
    """Bytes, a few merges with a space, two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<e>", "<s>", *alphabet, "st", "Ġst", "ke"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("s", "t"), ("Ġ", "st"), ("k", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<e>", "<s>")])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def test_log_likelihoods_are_those_of_the_hf_backend(pair):
    """Contexts of all lengths, shared ones, one beyond the model's, an empty one, white space at the ends."""
    ours, theirs = pair
    generator = random.Random(0)
    shots = words(generator, 12)
    contexts = ["", "key ", "state\n\n", *(words(generator, n) for n in (1, 5, 20, 60)), shots, f"{shots} layer"]
    requests = [
        asked(context, continuation)
        for context in contexts
        for continuation in (" state", " key value", "x", words(generator, 3), " state of it")
    ]
    requests += [asked("", "<e> state"), asked("", "<s> state"), asked("<s> token", " value")]
    expected, found = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests, disable_tqdm=True)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_the_hf_backend(pair):
    ours, theirs = pair
    texts = [asked(words(random.Random(n), n)) for n in (1, 30, 130)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=2e-3)


def test_written_text_is_that_of_the_hf_backend(pair):
    ours, theirs = pair
    generator = random.Random(1)
    short, long = {"until": ["\n", "t"], "max_gen_toks": 20, "do_sample": False}, {"until": "zzz", "max_gen_toks": 7}
    requests = [asked(words(generator, n), dict(short if n % 2 else long)) for n in (1, 2, 3, 7, 8, 80)]
    found = ours.generate_until(requests)
    # One at a time: the backend pads on the left, which changes what a context begins with.
    assert found == [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert any(found)


def test_a_hybrid_reads_shared_prefixes_as_whole_requests(pair, monkeypatch):
    """Layers with a state and windows too."""
    from nasbench.evaluation import harness_model

    ours, _ = pair
    shape = ours.decoder.shape
    decoder = random_decoder(shape, parse_placement("J W8"), seed=3)
    hybrid = harness_model.HarnessModel(decoder, ours.words, batch_size=3)
    shots = words(random.Random(0), 14)
    requests = [asked(f"{shots} {word}", f" {other}") for word in WORDS[:4] for other in WORDS[:3]]
    # Continuations, too, begin alike.
    requests += [asked(shots[:60], f"{shots[60:]} {word}") for word in WORDS[:4]]
    found, read = hybrid.loglikelihood(requests, disable_tqdm=True), []
    prefill = harness_model.prefill
    monkeypatch.setattr(harness_model, "prefill", lambda d, t, c: (read.append(t.shape), prefill(d, t, c))[1])
    assert hybrid.loglikelihood(requests, disable_tqdm=True) == found
    assert read
    monkeypatch.setattr(
        harness_model, "shared_prefixes", lambda rows, most, block: [Group((i,), 0) for i in range(len(rows))]
    )
    whole = hybrid.loglikelihood(requests, disable_tqdm=True)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in whole], abs=1e-4)


def test_prefixes_save_the_most_tokens():
    def prefixes(rows):
        return sorted(shared_prefixes(rows, [len(row) - 1 for row in rows], BLOCK), key=str)

    def row(*parts):
        return (*(token for part, blocks in parts for token in [part] * (BLOCK * blocks)), 0)

    # Two questions with the same eight blocks before them, four alternatives each: one prefix for all saves more.
    alternatives = [row((1, 8), (question, 1), (9 + choice, 1)) for question in (2, 3) for choice in range(4)]
    assert prefixes(alternatives) == [Group(tuple(range(8)), 8 * BLOCK)]
    # With longer questions each has its own.
    longer = [row((1, 1), (question, 4), (9 + choice, 1)) for question in (2, 3) for choice in range(4)]
    assert prefixes(longer) == [
        Group((0, 1, 2, 3), 5 * BLOCK),
        Group((4, 5, 6, 7), 5 * BLOCK),
    ]
    assert prefixes([row((1, 1)), row((2, 1))]) == [Group((0,), 0), Group((1,), 0)]
    assert prefixes([]) == []
    # What is scored stays behind the prefix.
    whole = (1,) * BLOCK
    assert prefixes([whole, (*whole, 2)]) == [Group((0,), 0), Group((1,), 0)]


YAML = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""


@pytest.fixture
def folder(tmp_path):
    """A harness task of four questions, as a user has one: a YAML and a JSONL file."""
    generator = random.Random(0)
    items = [{"question": words(generator, 5), "options": ["a state", "key"], "gold": i % 2} for i in range(4)]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "choice.yaml").write_text(YAML.format(folder=tmp_path))
    return tmp_path


def test_a_task_of_a_folder_is_scored_and_kept_with_its_settings(folder, make_run, tmp_path, monkeypatch):
    """As mc: scores the same choices; twice asked, once measured; also as an objective of a search."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.evaluation.harness_model import HarnessModel
    from nasbench.evaluation.tasks import parse_task
    from nasbench.search.objective import parse_objective
    from nasbench.supernet.settings import DistillConfig
    from nasbench.supernet.train import distill

    run = make_run(names=("A", "J"))
    distill(run, DistillConfig(ridge_tokens=512, align_tokens=0, supernet_tokens=0), dtype=torch.float32)
    evaluator = Evaluator.open(run, dtype=torch.float32)
    text, placement = f"tiny_choice:{folder}", ("J", "A", "J", "A")
    found = evaluator.scores(placement, [text])[text]
    (key,) = evaluator.store.find(task="tiny_choice")
    assert key.settings.startswith("lm-eval-0.")
    assert found.about["task_versions"] == {"tiny_choice": 3.0}
    assert (len(found.about["items"]), found.about["num_fewshot"]) == (4, {"tiny_choice": 0})
    beside = evaluator.store.find(task="tiny_choice.acc_norm")
    assert [scores.n for scores in beside.values()] == [4]

    items = [json.loads(line) for line in (folder / "choice.jsonl").read_text().splitlines()]
    same = [{"query": i["question"], "choices": [f" {o}" for o in i["options"]], "gold": i["gold"]} for i in items]
    (folder / "same.jsonl").write_text("\n".join(map(json.dumps, same)))
    plain = evaluator.scores(placement, [f"mc-plain:{folder}/same.jsonl"])[f"mc-plain:{folder}/same.jsonl"]
    assert found.samples.tolist() == plain.samples.tolist()

    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda *_: pytest.fail("measured again"))
    assert evaluator.scores(placement, [text])[text] == found
    assert [task.label for _, task in parse_objective(f"kl+0.5*{text}")] == ["kl", text]
    assert parse_task(f"tiny_choice@2:0:{folder}").label == f"tiny_choice@2:0:{folder}"


ODD = (
    "null", "[]", "{}", "5", "-1", "1e400", "'x'", "[[", "!function utils.f", "&a *a", "{a: b", "---", "'{{'", "true",
    "include: no.yaml", "'{{ 1/0 }}'", "'{{ question.x.y }}'", "\x00", "!!python/object/apply:os.system ['true']",
)  # fmt: skip


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_damaged_task_files_end_in_one_line(folder, count, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from nasbench.core.errors import NasbenchError
    from nasbench.evaluation import harness
    from nasbench.evaluation.tasks import Context, parse_task

    context = Context(
        SimpleNamespace(bos_id=None, encode_batch=lambda texts: [[1] * len(t) for t in texts]), None, None
    )
    whole, draw, fine = (folder / "choice.yaml").read_text(), random.Random(0), 0
    told = []
    for case in range(count):
        lines = (whole + "num_fewshot: 0\ngeneration_kwargs: {until: [a], max_gen_toks: 4}\n").splitlines()
        for _ in range(draw.choice([1, 1, 2, 3])):
            place, odd = draw.randrange(len(lines)), draw.choice(ODD)
            key, cut = lines[place].partition(":")[0], draw.randrange(len(lines[place]) + 1)
            lines[place] = draw.choice(["", f"{key}: {odd}", odd, lines[place][:cut] + odd + lines[place][cut + 1 :]])
        (folder / "choice.yaml").write_text("\n".join(lines) if case else whole)
        harness.manager.cache_clear()
        try:
            parse_task(f"tiny_choice:{folder}").scored_tokens(replace(context, memo={}))
            fine += 1
        except NasbenchError as error:
            told.append(str(error))
    assert fine
    assert told
    assert not any("\n" in message or len(message) > 1500 for message in told)


def test_written_and_rolling_tasks(folder, tiny_model, text_file, tmp_path, monkeypatch):
    """One item a line: whether the written line is the answer; nats a word of a text."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from nasbench.data.packing import Corpus
    from nasbench.evaluation.tasks import Context, parse_task
    from nasbench.runtime.generate import generate

    loaded = load_model(str(tiny_model))
    context = Context(loaded.tokenizer, Corpus.load(str(text_file), loaded.tokenizer, 32), None)
    texts = [f"the {word}" for word in WORDS[:3]]
    ids = generate(loaded.decoder, [context.tokenizer.encode(text) for text in texts], max_new_tokens=4)
    answers = [context.tokenizer.decode(ids[0]), "nowhere", context.tokenizer.decode(ids[2])]
    items = [{"question": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, items)))
    common = YAML.format(folder=folder).partition("output_type")[0]
    (folder / "written.yaml").write_text(
        common.replace("tiny_choice", "written") + "output_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ngeneration_kwargs: {until: [], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (folder / "rolling.yaml").write_text(
        common.replace("tiny_choice", "rolling") + "output_type: loglikelihood_rolling\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: '{{question}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    assert parse_task(f"written:{folder}").score(loaded.decoder, context).samples.tolist() == [1, 0, 1]
    rolling = parse_task(f"rolling:{folder}").score(loaded.decoder, context)
    assert (rolling.metric, rolling.higher_is_better) == ("nats", False)
    tokens = torch.tensor([[0, *context.tokenizer.encode(texts[1])]])
    with torch.no_grad():
        log_p = torch.log_softmax(loaded.decoder(tokens)[0, :-1], -1).gather(-1, tokens[0, 1:, None])
    assert rolling.samples[1] == pytest.approx(-float(log_p.sum()) / 2, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scores_as_a_cpu_does(tiny_model):
    """A hybrid, with prefixes from a cache and without."""
    pytest.importorskip("lm_eval")
    from nasbench.evaluation.harness_model import HarnessModel

    loaded = load_model(str(tiny_model))
    decoders = [random_decoder(loaded.shape, parse_placement("J A W8 M")) for _ in range(2)]
    models = [HarnessModel(decoder, loaded.tokenizer, 3) for decoder in (decoders[0], decoders[1].to("cuda"))]
    shots = words(random.Random(0), 30)
    requests = [asked(f"{start} {word}", f" {end}") for start in ("", shots) for word in WORDS for end in WORDS[:3]]
    expected, found = (model.loglikelihood(requests) for model in models)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in expected], abs=1e-2)


def test_a_name_that_nobody_knows(folder, monkeypatch):
    pytest.importorskip("lm_eval")
    from nasbench.evaluation import harness
    from nasbench.evaluation.tasks import parse_task

    with pytest.raises(UserError, match=r"unknown task 'tiny_choic'.*\(tiny_choice\)"):
        parse_task(f"tiny_choic:{folder}")
    with pytest.raises(UserError, match="no such folder of task files: absent"):
        parse_task("tiny_choice:absent")
    monkeypatch.setattr(harness, "manager", lambda folder: (_ for _ in ()).throw(ImportError()))
    with pytest.raises(UserError, match=r"unknown task 'mmlu'.*pip install 'nasbench\[eval\]'"):
        parse_task("mmlu")


@pytest.mark.slow
def test_smollm2_scores_as_the_hf_backend_does():
    """The real model, dequantised, in fp32: contexts of several lengths, four continuations each."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    import transformers
    from lm_eval.models.huggingface import HFLM

    from nasbench.checkpoints.resolve import classify, model_folder
    from nasbench.data.text import default_documents
    from nasbench.evaluation.harness_model import HarnessModel

    folder, loaded = model_folder(classify("default"))[0], load_model("default")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    fast.pad_token = fast.eos_token
    theirs = HFLM(model, tokenizer=fast, batch_size=8, device="cpu", max_length=8192)
    ours = HarnessModel(loaded.decoder, loaded.tokenizer, batch_size=8)
    texts = default_documents()[:4]
    requests = [
        asked(text[:size], end)
        for text, size in zip(texts, (30, 120, 400, 900), strict=True)
        for end in (text[size : size + 20], " yes", " the object", " 42")
    ] + [asked("", text[:50]) for text in texts]
    rolling = [asked(text[:200]) for text in texts]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    expected, found = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
