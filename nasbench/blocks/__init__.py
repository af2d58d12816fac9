"""Layer kinds. Importing this package registers the built-in ones and imports no torch."""

import nasbench.blocks.kernel_path  # noqa: F401  (the mixers import nasbench_kernels)
from nasbench.blocks.base import BLOCKS, LayerShape, MixerConfig, mixer_config
from nasbench.blocks.full_attention import FullAttentionConfig
from nasbench.blocks.gated_delta import GatedDeltaNetConfig, JetBlockConfig
from nasbench.blocks.sliding_window import SlidingWindowConfig

for _config in (FullAttentionConfig, SlidingWindowConfig, JetBlockConfig, GatedDeltaNetConfig):
    BLOCKS.register(_config.kind, _config)

__all__ = ["BLOCKS", "LayerShape", "MixerConfig", "mixer_config"]
