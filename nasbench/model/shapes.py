"""What a model is before it has weights: sizes, and a mixer and an FFN per layer. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from nasbench.core.registry import Registry
from nasbench.model.spec import BlockSpec, FFNSpec, LayerShape, MixerSpec, ffn_spec, mixer_spec
from nasbench.spaces.placement import Placement, is_of, parse_placement


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a decoder-only model but its weights.

    Attributes:
        source: the --model that named it, for commands that messages suggest; "" for a built-in shape.
        family: "llama", "qwen2", ...: the names and details of its checkpoint.
        published_placement: the layer kinds that the published model has, "" for full attention everywhere.
        defaults: (letter, arguments) of kinds named without arguments, for this model.
        activation: of the FFN's gate: "silu" or "gelu_tanh".
        ffn: the text of each layer's FFN; () for a gated one of `intermediate_size` in every layer.
        pre_norms, post_norms: whether a norm stands before every mixer and FFN, and after it, before the residual
            addition (both: Gemma; after it alone: OLMo 2).
        wide_qk_norm: the norms of queries and keys run over all heads together.
        rotary_dim: channels of a head that are rotated, 0 for all.
        no_rope: layers without rotary positions.
        query_scale: what queries are multiplied by beyond 1 / sqrt(head_dim); the weights have it.
        embedding_scale: what embeddings are multiplied by.
        window_rope_theta: rotary base of the layers that are windows in the published placement, None for the same.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float
    rms_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    rope_scaling: tuple[str | float, ...] = ()
    published_placement: str = ""
    defaults: tuple[tuple[str, str], ...] = ()
    activation: str = "silu"
    ffn: tuple[str, ...] = ()
    post_norms: bool = False
    embedding_scale: float = 1.0
    window_rope_theta: float | None = None
    pre_norms: bool = True
    wide_qk_norm: bool = False
    rotary_dim: int = 0
    no_rope: tuple[int, ...] = ()
    query_scale: float = 1.0
    source: str = field(default="", compare=False)

    def layer(self, index: int = 0) -> LayerShape:
        """The attention that layer `index` was pre-trained with. Every layer has the same sizes; the rotary positions
        may differ."""
        shape = LayerShape(**{field.name: getattr(self, field.name) for field in fields(LayerShape)})
        if index in self.no_rope:
            return replace(shape, rope_scaling=("none",))
        if self.window_rope_theta is not None and is_of(self.placement[index], "W"):
            return replace(shape, rope_theta=self.window_rope_theta, rope_scaling=())
        return shape

    @property
    def placement(self) -> Placement:
        return parse_placement(self.published_placement or f"{self.num_layers}A", self.num_layers)

    def mixer(self, name: str, index: int = 0) -> MixerSpec:
        """The specification of a layer name in layer `index` of this model. Raises UserError."""
        return mixer_spec(name, self.layer(index), self.defaults)

    def mixers(self, placement: Placement) -> list[MixerSpec]:
        """One specification per layer; equal ones share one object."""
        differ = self.window_rope_theta is not None or self.no_rope
        shapes = [self.layer(i) for i in range(len(placement))] if differ else [self.layer()]
        keys = [(name, shapes[i % len(shapes)]) for i, name in enumerate(placement)]
        known = {key: mixer_spec(*key, self.defaults) for key in dict.fromkeys(keys)}
        return [known[key] for key in keys]

    def ffn_spec(self, index: int = 0) -> FFNSpec:
        """The specification of a layer's FFN. Raises UserError."""
        text = self.ffn[index] if self.ffn else "gated"
        return ffn_spec(text, self.hidden_size, self.intermediate_size, self.activation)

    def ffns(self) -> list[FFNSpec]:
        """One specification per layer; equal ones share one object."""
        known = {text: self.ffn_spec(self.ffn.index(text)) for text in dict.fromkeys(self.ffn)}
        return [known[text] for text in self.ffn] if self.ffn else [self.ffn_spec()] * self.num_layers

    def blocks(self, placement: Placement) -> list[BlockSpec]:
        """The specifications of all mixers and FFNs."""
        return [*self.mixers(placement), *self.ffns()]

    def parse(self, placement: str) -> Placement:
        """Reads a placement of this model: layer count, letters and arguments checked. Raises UserError."""
        layers = parse_placement(placement, self.num_layers)
        self.mixers(layers)
        return layers

    def exact_until(self, placement: Placement) -> float:
        """Tokens of the longest text on which the placement is the model itself, its weights unchanged: infinite for
        the model's own placement. No score on texts up to there tells the two apart."""
        pairs = zip(self.mixers(self.placement), self.mixers(placement), strict=True)
        return min(math.inf if own == other else min(own.exact_until, other.exact_until) for own, other in pairs)

    def cache_bytes(self, placement: Placement, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Keys, values and recurrent states of all layers, as arXiv 2508.15884 counts the cache."""
        return sum(block.cache_bytes(batch, context, dtype_bytes) for block in self.blocks(placement))

    def conv_state_bytes(self, placement: Placement, batch: int, dtype_bytes: int = 2) -> int:
        """Inputs of short convolutions of all layers, which the paper's cache size leaves out."""
        return sum(block.conv_state_bytes(batch, dtype_bytes) for block in self.blocks(placement))

    @property
    def norms(self) -> int:
        """All norms around mixers and FFNs, and the last one. No FFN has no norm."""
        blocks = self.num_layers + sum(ffn.kind != "none" for ffn in self.ffns())
        return (self.pre_norms + self.post_norms) * blocks + 1

    def parameters(self, placement: Placement | None = None) -> int:
        """Number of parameters with this placement (default: the published one); tied embeddings count once."""
        blocks = sum(block.parameters() for block in self.blocks(placement or self.placement))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return blocks + self.norms * self.hidden_size + embeddings


DEFAULT_MODEL = "smollm2-135m"

MODELS: Registry[ModelSpec] = Registry("model")

# The larger shapes are here for speed, with random weights, at the contexts that arXiv 2508.15884 measures (to 256K),
# whatever their checkpoints were trained for.
_JET_2B = {"W": "1152", "J": "12x96x256", "G": "12x96x256"}
_JET_4B = {"W": "2048", "J": "16x128x256", "G": "16x128x256"}

for _shape in (
    ModelSpec(
        "smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 100_000.0, 1e-5, defaults=(("W", "128"),)
    ),
    ModelSpec("qwen3-1.7b", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 262144, 1e6, 1e-6, qk_norm=True),
    ModelSpec("qwen2.5-1.5b", "qwen2", 28, 1536, 8960, 12, 2, 128, 151936, 262144, 1e6, 1e-6, qkv_bias=True),
    ModelSpec("qwen2.5-3b", "qwen2", 36, 2048, 11008, 16, 2, 128, 151936, 262144, 1e6, 1e-6, qkv_bias=True),
    ModelSpec(
        "qwen2.5-7b", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 262144, 1e6, 1e-6, qkv_bias=True,
        tie_embeddings=False,
    ),
    ModelSpec(
        "llama3.2-3b", "llama", 28, 3072, 8192, 24, 8, 128, 128256, 262144, 500_000.0, 1e-5,
        rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192.0),
    ),
    ModelSpec(
        "jet-nemotron-2b", "jet_nemotron", 28, 1536, 8960, 12, 2, 128, 151936, 262144, 1e6, 1e-6, qkv_bias=True,
        published_placement="14J A 4J A 2W 6J", defaults=tuple(_JET_2B.items()),
    ),
    ModelSpec(
        "jet-nemotron-4b", "jet_nemotron", 36, 2048, 11008, 16, 2, 128, 151936, 262144, 1e6, 1e-6, qkv_bias=True,
        published_placement="5J W 10J W A J W A 2W 2J W J W 4J A 3J",
        defaults=tuple(_JET_4B.items()),
    ),
    # No FFN; its paper counts a bf16 state.
    ModelSpec(
        "mamba2-2.7b", "mamba2", 64, 2560, 0, 40, 40, 64, 50288, 262144, 10_000.0, 1e-5,
        published_placement="64M", defaults=(("M", "80x64x128x16"),), ffn=("none",) * 64,
    ),
    # Without the value residual (nasbench.model.mixers.rwkv7.mixer), 6M of 1,527M parameters.
    ModelSpec(
        "rwkv7-1.5b", "rwkv7", 24, 2048, 8192, 32, 32, 64, 65536, 262144, 10_000.0, 1e-5, tie_embeddings=False,
        published_placement="24R", defaults=(("R", "32x64"),), ffn=("channelmix",) * 24,
    ),
    # Stands in for the DeepSeek-V3-Small of arXiv 2508.15884 (2.2B of 15B parameters active): its shape is not public.
    ModelSpec(
        "deepseek-v2-lite", "deepseek_v2", 27, 2048, 10944, 16, 16, 128, 102400, 262144, 10_000.0, 1e-6,
        tie_embeddings=False, published_placement="27C", defaults=(("C", "512x64x128x128"),),
        ffn=("gated", *("moe@64x6x1408+2:raw",) * 26),
    ),
    ModelSpec(
        "gemma3-1b", "gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, 262144, 1e6, 1e-6, qk_norm=True,
        published_placement="5W A 5W A 5W A 5W A 2W", defaults=(("W", "512"),), activation="gelu_tanh",
        post_norms=True, embedding_scale=1152**0.5, window_rope_theta=10_000.0,
    ),
    ModelSpec(
        "qwen3-30b-a3b", "qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, 262144, 1e6, 1e-6, qk_norm=True,
        tie_embeddings=False, ffn=("moe@128x8x768",) * 48,
    ),
):  # fmt: skip
    MODELS.register(_shape.name, _shape)
