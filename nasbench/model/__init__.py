"""Layer kinds. Importing this package registers the built-in ones and imports no torch."""

import nasbench.model.kernel_path  # noqa: F401  (the mixers import nasbench_kernels)
from nasbench.model.mixers.attention.spec import FullAttentionConfig
from nasbench.model.mixers.gated_delta.spec import GatedDeltaNetConfig, JetBlockConfig
from nasbench.model.mixers.sliding_window.spec import SlidingWindowConfig
from nasbench.model.spec import BLOCKS, LayerShape, MixerConfig, mixer_config

for _config in (FullAttentionConfig, SlidingWindowConfig, JetBlockConfig, GatedDeltaNetConfig):
    BLOCKS.register(_config.kind, _config)

__all__ = ["BLOCKS", "LayerShape", "MixerConfig", "mixer_config"]
