"""The compiled decoder as transformers sees a causal language model: `generate` is theirs."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.decoder.native import Memory, NativeDecoder
from sparseworks.engine.decoder.packing import Report
from sparseworks.engine.decoder.saving import save_decoder

__all__ = ["Decoder", "DecoderCache"]

# what transformers calls the cache: `cache` from 5.20 on, `past_key_values` before
_CACHE = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)
_ROOM = 64  # tokens beyond the first ones that a new cache has room for


class DecoderCache(Cache):
    """Keys and values of a batch of texts; padding takes no room.

    Attributes:
        seen: columns of the batch so far, padding included.
        lengths: `[texts]` int32, tokens of each text so far.
    """

    def __init__(self, decoder: NativeDecoder) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.decoder = decoder
        self.memory: Memory | None = None
        self.seen = 0
        self.lengths = torch.zeros(0, dtype=torch.int32)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.decoder.spec.max_positions

    def __len__(self) -> int:
        return len(self.decoder.spec.layers)

    @property
    def batch_size(self) -> int:
        return -1 if self.memory is None else self.memory.texts

    @property
    def is_initialized(self) -> bool:
        return self.memory is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return []

    @property
    def is_linear(self) -> list[bool]:
        return []

    def start(self, texts: int, tokens: int) -> None:
        if self.memory is None:
            room = min(tokens + _ROOM, self.decoder.spec.max_positions)
            self.memory = Memory(self.decoder, texts, max(room, 1))
            self.lengths = torch.zeros(texts, dtype=torch.int32)
        elif self.memory.texts != texts:
            raise InvalidArgument(f"the cache holds {self.memory.texts} texts, {texts} are given")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.memory is not None:
            self.memory.select(indices)
            self.lengths = self.lengths[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory is not None:
            texts = torch.arange(self.memory.texts).repeat_interleave(repeats)
            self.batch_select_indices(texts)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each text (a negative number of them)."""
        if tokens_to_remove > 0:  # as before transformers 5: what is to be left
            tokens_to_remove -= self.seen
        gone = min(-tokens_to_remove, self.seen)
        if gone > 0:
            self.seen -= gone
            self.lengths = (self.lengths - gone).clamp_min(0)

    def reset(self) -> None:
        self.seen = 0
        self.lengths.zero_()

    def activate_past_recording(self) -> None:
        """Nothing to do: the past is kept."""


class Decoder(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model that runs as one native program a step; inference only.

    It is called and generates as the model it was made from: `generate` with sampling, beams,
    streamers, stopping criteria and assistants, pipelines and chat templates are those of
    transformers. Texts of different lengths are padded on the left.

    Attributes:
        native: the program.
        report: format, size and rounding error of each matrix.
    """

    _supports_sdpa = True
    _supports_cache_class = True
    main_input_name = "input_ids"
    base_model_prefix = ""

    def __init__(self, config: Any, native: NativeDecoder, report: Report,
                 generation_config: Any = None) -> None:  # fmt: skip
        super().__init__(config)
        self.native, self.report = native, report
        # as transformers' Phi-3; other models with two sets of angles keep the keys that they have
        again = str(getattr(config, "model_type", "")).startswith("phi")
        self._turns = [r.limit or 0 for r in native.spec.rotary if r.long is not None and again]
        if generation_config is not None:
            self.generation_config = generation_config
        super().train(False)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def get_input_embeddings(self) -> Any:
        return None

    def get_output_embeddings(self) -> Any:
        return None

    def train(self, mode: bool = True) -> Decoder:
        if mode:
            raise ModelError("a compiled decoder cannot be trained; train the model, compile again")
        return self

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> None:
        if model_kwargs.get(_CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[_CACHE] = DecoderCache(self.native)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not seen, and what `forward` takes."""
        if kwargs.get("inputs_embeds") is not None:
            raise InvalidArgument("a compiled decoder takes input_ids, not inputs_embeds")
        past = kwargs.get(_CACHE)
        seen = 0 if past is None else past.get_seq_length()
        if past is not None and any(seen <= x < input_ids.shape[1] for x in self._turns):
            past.reset()  # keys of a text that grew long turn by other angles: all anew
            seen = 0
        given = {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, _CACHE: past,
                 "use_cache": past is not None}  # fmt: skip
        keep = kwargs.get("logits_to_keep")
        return given if keep is None else {**given, "logits_to_keep": keep}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DecoderCache | None = None,
        past_key_values: DecoderCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token.

        Args:
            input_ids: `[texts, tokens]`, those that the cache has not seen.
            attention_mask: `[texts, seen + tokens]`, 0 for padding, which is on the left.
            position_ids: not needed; where given, they must count the tokens of each text.
            cache: of the tokens before; `past_key_values` is the same.
            use_cache: give a cache back; True where a cache is given.
            logits_to_keep: only of so many last tokens; 0: of all.
            labels: as transformers' models take them, for the loss.

        Returns:
            logits fp32 `[texts, tokens or logits_to_keep, vocabulary]`, 0 for padding.

        Raises:
            InvalidArgument: shapes that do not fit, padding inside a text, tokens that are not in
                the vocabulary, or a text longer than the model has positions.
        """
        past = cache if cache is not None else past_key_values
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise InvalidArgument(
                f"input_ids {list(input_ids.shape)} must be [texts, tokens] with at least one token"
            )
        if past is None:
            past = DecoderCache(self.native)
        elif not isinstance(past, DecoderCache):
            raise InvalidArgument(
                f"a compiled decoder keeps its own cache, not {type(past).__name__}"
            )
        texts, tokens = input_ids.shape
        past.start(texts, tokens)
        assert past.memory is not None
        if tokens == 1 and position_ids is None and labels is None:
            return self._one_each(input_ids, attention_mask, past, use_cache)
        real = _real(attention_mask, texts, past.seen, tokens)
        order = real.cumsum(1) - 1 + past.lengths[:, None]
        if position_ids is not None and not bool((position_ids == order)[real].all()):
            raise InvalidArgument("position_ids must count the tokens of each text, from 0")
        keep = logits_to_keep if 0 < logits_to_keep < tokens else tokens
        wanted = real.clone()
        wanted[:, : tokens - keep] = False
        where = real.nonzero()
        found = self.native.step(
            past.memory, input_ids[real], where[:, 0], order[real], wanted[real].nonzero()[:, 0]
        )
        past.seen += tokens
        past.lengths += real.sum(1).to(torch.int32)
        if texts * keep == found.shape[0]:
            logits = found.view(texts, keep, -1)
        else:
            logits = torch.zeros(texts, keep, found.shape[1])
            logits[wanted[:, tokens - keep :]] = found
        loss = None
        if labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return _output(logits, past, use_cache, loss)

    def _one_each(
        self, input_ids: Tensor, mask: Tensor | None, past: DecoderCache, use_cache: bool | None
    ) -> CausalLMOutputWithPast:
        """A token for each text, the many small steps of generation: as `forward`."""
        texts = input_ids.shape[0]
        if mask is not None and (
            mask.shape != (texts, past.seen + 1) or not bool(mask[:, -1].all())
        ):
            _real(mask, texts, past.seen, 1)  # says what is wrong
            raise InvalidArgument("attention_mask hides the only token of a text")
        memory = past.memory
        assert memory is not None
        logits = self.native.step_each(memory, input_ids[:, 0], past.lengths)
        past.seen += 1
        past.lengths += 1
        return _output(logits[:, None], past, use_cache)

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or hub name of the model that this was made from, where it is known."""
        return getattr(self.config, "_name_or_path", None) or None

    def explain(self) -> str:
        """A line a matrix: format, bytes, bits a weight, what is kept, and the rounding error."""
        return self.report.text()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the decoder as one safetensors file, which `load_decoder` maps."""
        save_decoder(self, path)


def _output(
    logits: Tensor, past: DecoderCache, use_cache: bool | None, loss: Tensor | None = None
) -> CausalLMOutputWithPast:
    kept: dict[str, Any] = {_CACHE: past if use_cache is not False else None}
    return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)


def _real(mask: Tensor | None, texts: int, seen: int, tokens: int) -> Tensor:
    """Which of the new tokens are no padding `[texts, tokens]`."""
    if mask is None:
        return torch.ones(texts, tokens, dtype=torch.bool)
    if mask.shape != (texts, seen + tokens):
        raise InvalidArgument(
            f"attention_mask {list(mask.shape)} must be [texts, tokens so far] = "
            f"{[texts, seen + tokens]}"
        )
    flags = mask.bool()
    if bool((flags[:, :-1] & ~flags[:, 1:]).any()):
        raise InvalidArgument("padding inside or after a text; pad on the left")
    return flags[:, seen:]


assert "logits_to_keep" in inspect.signature(Decoder.forward).parameters  # generate looks for it
