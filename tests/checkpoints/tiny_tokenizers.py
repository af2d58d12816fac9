"""Small tokenizers with the parts that each family's published tokenizer has, trained on a few lines."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = """The quick brown fox, 1024 of them: don't you'll we've I'm. naïve café 日本語 中文 🙂🙃 x = f(y) + 3.14159
def f(x):\n\treturn [1, 2, 3]\n\n\n    indented    lines\r\nwindows\r\n  two  spaces   three"""
HARD = [
    "", " ", "  ", "\n", "\n\n\n", " \n ", "\t\t", "a ", " a", "  a  ", "a  b   c", "12345", "3.14159", "1,000,000",
    "2024-11-30", "\n\n1)", "x1y22z333", "don't we've I'LL", "naïve café", "e\u0301 é", "日本語 中文",
    "🙂🙃👩\u200d👩", "\x00\x01",
    "a\r\nb\r\n", "\u00a0nbsp\u2003em", "<s>", "text </s> more", " <|im_start|>user\nhi<|im_end|>\n", "<s><s>a", "▁a ▁",
    "[1, 2] {\"a\": 1}", "x" * 200, "İıſ ﬁ Ⅷ ½", "\ufeffbom", "the\u0000end",
]  # fmt: skip
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(splits, normalizer=None, **model):
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    train(backend, pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<s>", "</s>"])
    return backend


def train(backend, alphabet, special):
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(TEXT.split("\n") * 2, trainer)


def pieces(prefix):
    """A SentencePiece model as tokenizer.json files hold it: spaces become ▁, what no token covers becomes bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    train(backend, ["▁"], ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def begin(backend, token="<s>"):
    number = backend.token_to_id(token)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )
    return backend


def split(pattern):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), plain]


CHAT = ["<|im_start|>", "<|im_end|>"]
DECLARED = {
    str(900 + i): {"content": token, "lstrip": False, "rstrip": i == 1, "normalized": False, "special": True,
                   "single_word": False}
    for i, token in enumerate(CHAT)
}  # fmt: skip
SMOLLM = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]

# name -> (tokenizer, tokenizer_config.json or None where there is none)
FAMILIES = {
    "llama2": lambda: (begin(pieces(True)), {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}),
    "llama3": lambda: (begin(byte_level(split(GPT4), ignore_merges=True)), None),
    "smollm2": lambda: (byte_level(SMOLLM), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "smollm3": lambda: (byte_level(split(GPT4)), {"added_tokens_decoder": DECLARED, "eos_token": "<|im_end|>"}),
    "qwen": lambda: (
        byte_level(split(GPT4.replace("{1,3}", "")), normalizers.NFC()),
        {"add_bos_token": False, "eos_token": "<|im_end|>", "additional_special_tokens": CHAT},
    ),
    "mistral": lambda: (begin(pieces(True)), {"bos_token": {"__type": "AddedToken", "content": "<s>"}}),
    "gemma": lambda: (begin(pieces(False)), {"add_bos_token": True, "bos_token": "<s>"}),
    "phi3": lambda: (pieces(True), {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}),
    "olmo2": lambda: (byte_level(split(GPT4)), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "split-special": lambda: (byte_level(SMOLLM), {"split_special_tokens": True}),
    "flag-ignored": lambda: (begin(byte_level(SMOLLM)), {"add_bos_token": False, "bos_token": "<s>"}),
    "flag-alone": lambda: (byte_level(SMOLLM), {"add_bos_token": True, "bos_token": "<s>"}),
}


def save(name, folder):
    """Writes a tokenizer of FAMILIES; special tokens that chats use stand in tokenizer.json for some of them."""
    backend, config = FAMILIES[name]()
    if name == "llama3":
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT])
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
