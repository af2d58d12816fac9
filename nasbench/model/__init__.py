"""What a model is: blocks before and with weights, the residual stream, our decoder.

Importing this package registers the built-in blocks and imports no torch.
"""

import nasbench.model.kernel_path  # noqa: F401  (the blocks import nasbench_kernels)
from nasbench.model.ffn.spec import ChannelMixSpec, GatedFFNSpec, MixtureSpec, NoFFNSpec
from nasbench.model.mixers.attention.spec import FullAttentionSpec
from nasbench.model.mixers.gated_delta.spec import (
    DeltaNetSpec,
    GatedDeltaNetSpec,
    GLASpec,
    JetBlockSpec,
    KimiDeltaSpec,
    RetNetSpec,
)
from nasbench.model.mixers.mamba2.spec import Mamba2Spec
from nasbench.model.mixers.mla.spec import LatentAttentionSpec
from nasbench.model.mixers.none.spec import NoMixerSpec
from nasbench.model.mixers.rwkv7.spec import RWKV7Spec
from nasbench.model.mixers.sliding_window.spec import SlidingWindowSpec
from nasbench.model.mixers.windowed.spec import WindowedJetBlockSpec
from nasbench.model.spec import FFNS, MIXERS, LayerShape, MixerSpec, mixer_spec

for _mixer in (
    FullAttentionSpec, SlidingWindowSpec, JetBlockSpec, GatedDeltaNetSpec, DeltaNetSpec, KimiDeltaSpec, GLASpec,
    RetNetSpec, Mamba2Spec, WindowedJetBlockSpec, RWKV7Spec, LatentAttentionSpec, NoMixerSpec,
):  # fmt: skip
    MIXERS.register(_mixer.kind, _mixer)
for _ffn in (GatedFFNSpec, MixtureSpec, ChannelMixSpec, NoFFNSpec):
    FFNS.register(_ffn.kind, _ffn)

__all__ = ["FFNS", "MIXERS", "LayerShape", "MixerSpec", "mixer_spec"]
