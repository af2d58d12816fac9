"""Replacing attention layers of a loaded model by other kinds that start from the attention's weights."""

from __future__ import annotations

from nasbench.core.errors import UserError
from nasbench.model.decoder import Decoder
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.spaces.placement import Placement


def retrofit(decoder: Decoder, placement: Placement) -> Decoder:
    """A decoder of `placement` that shares every unchanged module with `decoder`.

    A layer whose kind and size stay keeps its mixer; every other one gets a new mixer, made by `init_from_attention`.

    Raises:
        UserError: wrong number of layers, or a layer to change that is not full attention now.
    """
    if len(placement) != len(decoder.placement):
        raise UserError(f"placement has {len(placement)} layers, the model has {len(decoder.placement)}")
    mixers = []
    for index, (mixer, config) in enumerate(zip(decoder.mixers, decoder.shape.mixers(placement), strict=True)):
        if mixer.config == config:
            mixers.append(mixer)
        elif type(mixer) is FullAttention:
            mixers.append(config.mixer_class().init_from_attention(config, mixer))
        else:
            old, new = decoder.placement[index], placement[index]
            raise UserError(f"layer {index} is {old}: only full attention can be turned into {new}")
    return decoder.with_mixers(mixers, placement)
