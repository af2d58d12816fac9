"""Layer kinds. Importing this package registers the built-in ones and imports no torch."""

import nasbench.model.kernel_path  # noqa: F401  (the mixers import nasbench_kernels)
from nasbench.model.mixers.attention.spec import FullAttentionSpec
from nasbench.model.mixers.gated_delta.spec import GatedDeltaNetSpec, JetBlockSpec
from nasbench.model.mixers.sliding_window.spec import SlidingWindowSpec
from nasbench.model.spec import MIXERS, LayerShape, MixerSpec, mixer_spec

for _config in (FullAttentionSpec, SlidingWindowSpec, JetBlockSpec, GatedDeltaNetSpec):
    MIXERS.register(_config.kind, _config)

__all__ = ["MIXERS", "LayerShape", "MixerSpec", "mixer_spec"]
