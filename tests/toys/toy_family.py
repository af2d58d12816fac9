"""A family of checkpoints that another package adds: names of GPT-2's kind, and the FFN `square` in every layer."""

import re
from typing import ClassVar

from nasbench.checkpoints.families.family import INERT, Family, Place
from nasbench.model.shapes import ModelSpec

FIELDS = {
    "num_layers": "n_layer", "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_heads": "n_head",
    "num_kv_heads": "n_kv_head", "head_dim": "n_head_dim", "vocab_size": "vocab_size", "max_context": "n_positions",
}  # fmt: skip
WHOLE = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "ln_f.weight"}
MODULES = {
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v", "self_attn.o_proj": "attn.o", "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}  # fmt: skip


def renamed(name, old, new, whole, modules):
    match = re.fullmatch(rf"{re.escape(old)}\.(\d+)\.(.+)\.weight", name)
    return whole.get(name, name) if match is None else f"{new}.{match[1]}.{modules.get(match[2], match[2])}.weight"


class Toy(Family):
    model_type: ClassVar[str] = "toy"
    architecture: ClassVar[str] = "ToyForCausalLM"

    def from_config(self, fields, name):
        sizes = {ours: fields.integer(theirs) for ours, theirs in FIELDS.items()}
        fields.neutral("activation_function", "squared_relu")
        theta, eps = fields.number("rope_theta", 10_000.0), fields.number("layer_norm_epsilon", 1e-5)
        fields.finish(INERT)
        ffn = ("square",) * sizes["num_layers"]
        return ModelSpec(name, self.model_type, **sizes, rope_theta=theta, rms_eps=eps, ffn=ffn)

    def own_config(self, spec, placement):
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "activation_function": "squared_relu",
            "rope_theta": spec.rope_theta,
            "layer_norm_epsilon": spec.rms_eps,
            **{theirs: getattr(spec, ours) for ours, theirs in FIELDS.items()},
        }

    def place(self, name, spec):
        whole, modules = ({theirs: ours for ours, theirs in names.items()} for names in (WHOLE, MODULES))
        return Place(renamed(name, "h", "model.layers", whole, modules))

    def split(self, name, tensor, spec, placement):
        yield renamed(name, "model.layers", "h", WHOLE, MODULES), tensor
