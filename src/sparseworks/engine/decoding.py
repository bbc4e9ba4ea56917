"""`sparseworks.compile_decoder`: greedy generation that reads only the kept weights.

A step of decoding multiplies every weight by one vector, so that its time is the bytes of the
weights. Every linear layer gets the layout that was measured fastest for one vector: packed bf16
values under a bit mask, with 16-bit indices, 8-bit integers, or the dense matrix as it is. Prompts
(several tokens at once) run through the batched sparse product. Keys and values are kept in a
static cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.measuring import interleaved_ms, one_thread
from sparseworks.engine.products import SparseLinear
from sparseworks.kernels import pack_index, pack_integer, pack_mask, spmv
from sparseworks.kernels.native import available, instruction_set

__all__ = ["DecodeLinear", "Decoder", "compile_decoder"]

_INDEXED = 0.8  # sparsity from which on indices are tried
_PROMPT = 0.6  # sparsity from which on prompts run through the sparse product
_FEW = 4  # tokens up to which one vector after the other is fastest


class DecodeLinear(nn.Module):
    """y = W x + b for one token at a time; inference only.

    Args:
        layer: the dense layer.
        packed: its weight in a layout of `sparseworks.kernels`, or None for dense.
        threads: of the native kernels.
    """

    bias: Tensor | None
    dense: Tensor | None

    def __init__(self, layer: nn.Linear, packed: Any, threads: int) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.sparsity = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
        self.packed, self.threads = packed, threads
        bias = None if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("bias", bias)
        keep = packed is None or self.sparsity < _PROMPT
        self.register_buffer("dense", weight if keep else None)
        self.many = None if keep else SparseLinear(weight.float(), self.bias, threads)

    @property
    def layout(self) -> str:
        return "dense" if self.packed is None else type(self.packed).__name__

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if self.packed is not None and flat.shape[0] <= _FEW:
            found = [spmv(self.packed, v.float(), self.bias, self.threads) for v in flat]
            y = torch.stack(found)
        elif self.many is not None:
            y = self.many(flat.float())
        else:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            assert self.dense is not None  # kept where nothing else runs long prompts
            y = F.linear(flat, self.dense, bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.layout}, sparsity={self.sparsity:.3f}"
        )


class Decoder:
    """Greedy generation of a Hugging Face causal language model.

    Attributes:
        model: a copy whose linear layers are `DecodeLinear`.
        times: milliseconds a vector by layer: chosen layout, and dense.
    """

    def __init__(self, model: nn.Module, times: dict[str, dict[str, float]]) -> None:
        self.model, self.times = model, times
        layers = [m for m in model.modules() if isinstance(m, (DecodeLinear, nn.Linear))]
        self.packed = all(getattr(m, "packed", None) is not None for m in layers)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, *, eos_token_id: int | None = None
    ) -> Tensor:
        """Append the likeliest token again and again.

        Args:
            input_ids: `[batch, tokens]`, without padding.
            max_new_tokens: at most so many.
            eos_token_id: stop when every text has had it; None: the model's own, if it has one.

        Returns:
            Prompt and new tokens, `[batch, tokens + new]`; after its end a text is filled up with
            the end token.

        Raises:
            InvalidArgument: no tokens, or none to be generated.
        """
        if input_ids.ndim != 2 or input_ids.numel() == 0 or max_new_tokens < 1:
            raise InvalidArgument(
                f"input_ids {list(input_ids.shape)} must be [batch, tokens] with at least one "
                f"token, max_new_tokens={max_new_tokens} at least 1"
            )
        from transformers import StaticCache

        config: Any = self.model.config
        own = getattr(self.model.generation_config, "eos_token_id", None)
        end = _first(own) if eos_token_id is None else eos_token_id
        length = input_ids.shape[1] + max_new_tokens
        cache = StaticCache(config=config, max_cache_len=length)
        ids, given, place = input_ids, input_ids, 0
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            position = torch.arange(place, place + given.shape[1])
            with one_thread() if self.packed and place else nullcontext():
                output = self.model(
                    input_ids=given, past_key_values=cache, cache_position=position,
                    position_ids=position[None], use_cache=True, logits_to_keep=1,
                )  # fmt: skip
            following = output.logits[:, -1].argmax(-1)
            if end is not None:
                following = following.masked_fill(done, end)
                done |= following == end
            given, place = following[:, None], place + given.shape[1]
            ids = torch.cat([ids, given], 1)
            if bool(done.all()):
                break
        return ids

    def explain(self) -> str:
        """A line per linear layer: layout, sparsity, and the time a vector takes."""
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, DecodeLinear)}
        width = max((len(n) for n in layers), default=5)
        lines = [f"{'layer':<{width}}  layout       sparsity       ms  dense ms"]
        for name, layer in layers.items():
            times = self.times[name]
            lines.append(
                f"{name:<{width}}  {layer.layout:<11}  {layer.sparsity:8.3f} "
                f"{times[layer.layout]:8.4f}  {times['dense']:8.4f}"
            )
        return "\n".join(lines)


def compile_decoder(model: nn.Module, *, int8: bool = False, threads: int | None = None) -> Decoder:
    """Make a sparse causal language model generate faster, one text at a time.

    Args:
        model: of transformers, fp32 or bf16, on the CPU; left as it is. Kept weights are rounded
            to bf16 (a bf16 model keeps its bits); sums are fp32.
        int8: also try 8-bit integers with one scale for 128 columns; less exact.
        threads: of the native kernels; None: as many as torch uses.

    Raises:
        ModelError: not a causal language model of transformers, not on the CPU, or weights that
            are not finite.
    """
    if not hasattr(model, "generation_config") or not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is not a causal language model of transformers "
            "(it has no generation_config)"
        )
    odd = next((n for n, p in model.named_parameters() if p.device.type != "cpu"), None)
    if odd is not None:
        raise ModelError(f"{odd} is not on the CPU; compile_decoder takes models on the CPU")
    instruction_set()
    count = torch.get_num_threads() if threads is None else threads
    twin = copy.deepcopy(model).eval()
    times: dict[str, dict[str, float]] = {}
    for name, layer in list(twin.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        if not bool(torch.isfinite(layer.weight).all()):
            raise ModelError(f"{name}.weight: NaN or Inf; nothing was compiled")
        made, times[name] = _fastest(layer, int8, count)
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, made)
    return Decoder(twin, times)


def _fastest(layer: nn.Linear, int8: bool, threads: int) -> tuple[DecodeLinear, dict[str, float]]:
    weight = layer.weight.detach()
    sparsity = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    candidates: dict[str, Any] = {"dense": None}
    if available():
        tried = [pack_mask]
        if sparsity >= _INDEXED and weight.shape[1] <= 1 << 16:
            tried.append(pack_index)  # type: ignore[arg-type]
        if int8:
            tried.append(pack_integer)  # type: ignore[arg-type]
        for pack in tried:
            packed = pack(weight)
            candidates[type(packed).__name__] = packed
    x = torch.randn(layer.in_features)
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.linear(x.to(weight.dtype)[None], weight, layer.bias)
    }
    for name, packed in candidates.items():
        if packed is not None:
            runs[name] = lambda packed=packed: spmv(packed, x, None, threads)  # type: ignore[misc]
    times = dict(zip(runs, interleaved_ms(*runs.values()), strict=True))
    best = min(times, key=lambda name: times[name])
    return DecodeLinear(layer, candidates[best], threads), times


def _first(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        return int(value[0]) if value else None
    return None if value is None else int(value)
