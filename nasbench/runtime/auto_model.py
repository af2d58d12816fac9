"""Our checkpoints as a model class of transformers: `AutoModelForCausalLM.from_pretrained(FOLDER)` after
`import nasbench`. The folder is one that `nasbench export --format hf` wrote for a placement that the family's own
format has no place for.

Logits, loss and gradients, greedy and sampled text with our caches, contexts padded on the left. Beam search works
without a cache.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutput

from nasbench.checkpoints.families import Hybrid, read_spec
from nasbench.checkpoints.load import load_decoder
from nasbench.checkpoints.resolve import classify, model_folder
from nasbench.model.decoder import Decoder, DecoderCache
from nasbench.runtime.auto_config import NasbenchConfig
from nasbench.runtime.generate import cache_rows, prefill


class NasbenchForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of any mixers and FFNs. Its weights lie in `decoder`."""

    config_class = NasbenchConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: NasbenchConfig) -> None:
        super().__init__(config)
        spec = read_spec({"model_type": Hybrid.model_type, **config.fields}, "a hybrid", "config.json")
        self.decoder = Decoder(spec, spec.placement)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *_: Any, config: Any = None, **options: Any
    ) -> Self:
        """The model of a folder or a hub name, read as nasbench reads it: one tensor at a time to its device.

        Args:
            options: `dtype` or `torch_dtype` (default: the checkpoint's), `device_map` (one device). Others are
                transformers' own and without effect here.
        """
        path, spec, _source = model_folder(classify(str(folder)))
        config = config or cls.config_class.from_pretrained(path)
        dtype = options.get("dtype", options.get("torch_dtype")) or "auto"
        if dtype == "auto":
            dtype = getattr(config, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        place = options.get("device_map") or "cpu"
        place = place.get("", "cpu") if isinstance(place, dict) else place
        if place == "auto":
            place = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device("meta"):
            model = cls(config)
        model.decoder = load_decoder(path, spec, dtype=dtype, device=place)
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model.eval()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_cache: DecoderCache | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """input_ids [B, T] -> logits [B, T, V], or of the last `logits_to_keep` tokens; with labels [B, T] the mean
        loss in nats of those that are not -100.

        Args:
            attention_mask: [B, tokens so far], zeros on the left of a row (or behind its end, without a cache).
            decoder_cache: continues after it.
        """
        padding = _left_padding(attention_mask, input_ids)
        if decoder_cache is not None:
            logits = self._cached(input_ids, padding, decoder_cache)
        elif any(padding):
            rows = [self.decoder(ids[None, start:])[0] for ids, start in zip(input_ids, padding, strict=True)]
            logits = torch.stack([F.pad(row, (0, 0, start, 0)) for row, start in zip(rows, padding, strict=True)])
        else:
            hidden = self.decoder.hidden_by_layer if torch.is_grad_enabled() else self.decoder.hidden
            logits = self.decoder.logits(hidden(input_ids)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _cached(self, input_ids: Tensor, padding: list[int], cache: DecoderCache) -> Tensor:
        """Logits [B, 1, V] of the last token, each row at its own place behind its padding."""
        before, tokens = cache.length, input_ids.shape[1]
        if not any(padding):
            return prefill(self.decoder, input_ids, cache)[:, None] if tokens > 1 else self.decoder(input_ids, cache)
        if not before:
            rows = [
                prefill(self.decoder, ids[None, start:], cache_rows(cache, slice(row, row + 1)))
                for row, (ids, start) in enumerate(zip(input_ids, padding, strict=True))
            ]
            logits = torch.cat(rows)
        else:
            starts = torch.tensor(padding, device=input_ids.device)
            for step in range(tokens):
                logits = self.decoder.step_at(input_ids[:, step], before + step - starts, cache)
        cache.length = before + tokens
        return logits[:, None]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *_: Any,
    ) -> None:  # fmt: skip
        if generation_config.use_cache is not False and generation_mode in _MODES:
            rows = batch_size * (generation_config.num_return_sequences or 1)
            model_kwargs["decoder_cache"] = self.decoder.new_cache(rows, max_cache_length)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *_: Any,
        attention_mask: Tensor | None = None,
        decoder_cache: DecoderCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        new = input_ids if decoder_cache is None else input_ids[:, decoder_cache.length :]
        return {"input_ids": new, "attention_mask": attention_mask, "decoder_cache": decoder_cache}


_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def _left_padding(mask: Tensor | None, input_ids: Tensor) -> list[int]:
    """Tokens of padding before each row."""
    if mask is None or bool(mask[:, 0].all()):
        return [0] * len(input_ids)
    return mask.bool().int().argmax(1).tolist()


def register() -> None:
    AutoModelForCausalLM.register(NasbenchConfig, NasbenchForCausalLM, exist_ok=True)
