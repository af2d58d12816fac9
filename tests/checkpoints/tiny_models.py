"""Small random models of every family, written by transformers."""

import torch

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 12345.0}

# name -> (family, configuration beyond SIZES)
TINY = {
    "llama-tied": ("Llama", {"num_key_value_heads": 2, "rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"num_key_value_heads": 4, "rope_parameters": DEFAULT_ROPE, "rms_norm_eps": 1e-3}),
    "llama-head-dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 24, "rope_parameters": DEFAULT_ROPE}),
    "llama3-rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"num_key_value_heads": 1, "rope_parameters": DEFAULT_ROPE}),
    "qwen3-tied": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 32, "rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True},
    ),
    "qwen3-untied": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": DEFAULT_ROPE}),
}

LINEAR = {"rope_type": "linear", "rope_theta": 9000.0, "factor": 4.0}
WINDOWS = {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 13}
MOE = {
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GEMMA = {"num_key_value_heads": 2, "num_hidden_layers": 7, "sliding_window": 9, "head_dim": 16}
GEMMA |= {"query_pre_attn_scalar": 16}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 90_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
TINY |= {
    "llama-linear-rope": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LINEAR}),
    "mistral-windows": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 17}),
    "mistral-full": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2-windows": ("Qwen2", WINDOWS | {"max_window_layers": 1}),
    "qwen3-windows": (
        "Qwen3",
        WINDOWS | {"layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding")]},
    ),
    "qwen3-moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3Moe", MOE | WINDOWS | {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3-ropes": ("Gemma3", GEMMA | {"rope_parameters": GEMMA_ROPES, "max_position_embeddings": 512}),
}
YARN = {"rope_type": "yarn", "rope_theta": 9000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 9000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.5 * i for i in range(6)],
}
SHORT = {"num_key_value_heads": 2, "max_position_embeddings": 32}
"""A context that texts of 100 tokens exceed: a scaled rotary embedding extends it."""
PHI = {"num_key_value_heads": 2, "pad_token_id": None}
PARTIAL = {"partial_rotary_factor": 0.75}
TINY |= {
    "llama-yarn": ("Llama", SHORT | {"rope_parameters": YARN}),
    "llama-dynamic": ("Llama", SHORT | {"rope_parameters": DYNAMIC}),
    "llama-linear-beyond": ("Llama", SHORT | {"rope_parameters": LINEAR}),
    "qwen2-yarn": ("Qwen2", SHORT | {"rope_parameters": YARN | {"truncate": False, "beta_fast": 8.0}}),
    "qwen3-yarn": (
        "Qwen3",
        SHORT | {"head_dim": 16, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "num_key_value_heads": 2, "pad_token_id": None}),
    "smollm3-windows": (
        "SmolLM3",
        WINDOWS | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "pad_token_id": None, "rope_parameters": YARN},
    ),
    "phi3": ("Phi3", PHI),
    "phi3-windows": ("Phi3", PHI | {"sliding_window": 17, "tie_word_embeddings": True}),
    "phi3-partial": ("Phi3", PHI | PARTIAL),
    "phi3-longrope": (
        "Phi3",
        PHI | PARTIAL | {"rope_parameters": LONG | PARTIAL, "original_max_position_embeddings": 64},
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2, "pad_token_id": None}),
    "gemma3-scale": ("Gemma3", GEMMA | {"query_pre_attn_scalar": 24}),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
"""Names of configuration classes that are not the family's own."""


def make_tokenizer(folder, vocab_size=211):
    """A byte-level tokenizer of `vocab_size` ids, enough for a model folder to be whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


def save_tiny(name, folder):
    """A random transformers model of `TINY[name]`, saved with a tokenizer; norms and biases are random too."""
    import transformers

    family, extra = TINY[name]
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**SIZES | extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5).sub_(1.0 if family == "Gemma3" else 0.0)
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model
