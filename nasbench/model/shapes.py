"""Model shapes without weights. Imports no torch: enough for costs and, with random weights, for speed."""

from __future__ import annotations

from dataclasses import dataclass

from nasbench.core.registry import Registry
from nasbench.model import LayerShape, MixerSpec, mixer_spec
from nasbench.spaces.placement import Placement, parse_placement


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a decoder-only model but its weights.

    Attributes:
        family: "llama", "qwen2", "qwen3" or "jet_nemotron": the names and details of its checkpoint.
        placement: the layer kinds that the published model has.
        defaults: (letter, arguments) of kinds named without arguments, for this model.
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

    @property
    def layer(self) -> LayerShape:
        """The attention shape that every layer's mixer is derived from."""
        return LayerShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_context=self.max_context,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            rope_theta=self.rope_theta,
            rms_eps=self.rms_eps,
            rope_scaling=self.rope_scaling,
        )

    @property
    def placement(self) -> Placement:
        return parse_placement(self.published_placement or f"{self.num_layers}A", self.num_layers)

    def mixer(self, name: str) -> MixerSpec:
        """The configuration of a layer name in this model. Raises UserError."""
        return mixer_spec(name, self.layer, self.defaults)

    def mixers(self, placement: Placement) -> list[MixerSpec]:
        """One configuration per layer; equal names share one object."""
        known = {name: self.mixer(name) for name in dict.fromkeys(placement)}
        return [known[name] for name in placement]

    def parse(self, placement: str) -> Placement:
        """Reads a placement of this model: layer count, letters and arguments checked. Raises UserError."""
        layers = parse_placement(placement, self.num_layers)
        self.mixers(layers)
        return layers

    def cache_bytes(self, placement: Placement, batch: int, context: int, dtype_bytes: int = 2) -> int:
        """Keys, values and recurrent states of all layers, as arXiv 2508.15884 counts the cache."""
        return sum(config.cache_bytes(batch, context, dtype_bytes) for config in self.mixers(placement))

    def history_bytes(self, placement: Placement, batch: int, dtype_bytes: int = 2) -> int:
        """Inputs of short convolutions of all layers, which the paper's cache size leaves out."""
        return sum(config.history_bytes(batch, dtype_bytes) for config in self.mixers(placement))

    def mlp_parameters(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def parameters(self, placement: Placement | None = None) -> int:
        """Number of parameters with this placement (default: the published one); tied embeddings count once."""
        mixers = sum(config.parameters() for config in self.mixers(placement or self.placement))
        rest = self.num_layers * (self.mlp_parameters() + 2 * self.hidden_size) + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return mixers + rest + embeddings


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
):  # fmt: skip
    MODELS.register(_shape.name, _shape)
