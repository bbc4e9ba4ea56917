"""`sparseworks.compile_decoder`: a causal language model as one native program a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.decoder.native import CACHES, NativeDecoder
from sparseworks.engine.decoder.packing import DTYPES, pack_model
from sparseworks.engine.decoder.reading import read_model
from sparseworks.engine.layerwise import LayerwiseDecoder, by_linear_layers
from sparseworks.kernels.native import available, instruction_set
from sparseworks.models.active import without_gates
from sparseworks.models.calls import call, split
from sparseworks.models.modes import evaluating

__all__ = ["compile_decoder"]

# of logits, relative; rounding weights of a model that was not trained loses the most
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1, "int4": 0.7}
_TEXT = 24  # tokens of the comparison with the model


def compile_decoder(
    model: nn.Module,
    *,
    dtype: str = "bf16",
    head: str | None = None,
    cache: str = "fp16",
    data: Iterable[Any] | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Make a causal language model of transformers decode faster on a CPU, the more so the sparser.

    Each matrix is packed in the format that was measured fastest, and a step (embedding, norms,
    attention over a native cache, MLPs or experts, head) is one native call. What is returned is a
    causal language model of transformers: `generate`, pipelines and streamers work as ever.

    Args:
        model: on the CPU; left as it is.
        dtype: of the kept weights: "fp32", "bf16", "int8" (a scale for 32 or 128 columns) or
            "int4" (for 32 or 64; groups of 16 where whole groups are zero).
        head: of the output head; None: as `dtype`.
        cache: of keys and values: "fp32", "fp16", or "int8" with a scale for each head and token.
        data: batches as the model takes them; integers are then rounded where the inputs of a layer
            are largest (the mean square of each input weighs the error).
        threads: of the native code; None: as many as torch uses.
        progress: called with the name of each matrix as it is packed.

    Returns:
        `Decoder`; for a family that is not known here, or without native code, the model with
        faster linear layers (`LayerwiseDecoder`), whose `notes` say why.

    Raises:
        ModelError: not a causal language model of transformers, not on the CPU, or weights that
            are not finite.
        InvalidArgument: an unknown dtype.
    """
    if not hasattr(model, "generation_config") or not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is not a causal language model of transformers "
            "(it has no generation_config)"
        )
    for value, known in ((dtype, DTYPES), (head, DTYPES), (cache, CACHES)):
        if value is not None and value not in known:
            raise InvalidArgument(f"{value!r} is no dtype; use one of {', '.join(known)}")
    odd = next((n for n, p in model.named_parameters() if p.device.type != "cpu"), None)
    if odd is not None:
        raise ModelError(f"{odd} is not on the CPU; compile_decoder takes models on the CPU")
    instruction_set()
    count = torch.get_num_threads() if threads is None else threads
    if count < 1:
        raise InvalidArgument(f"threads={threads} must be at least 1")
    if not available():
        return _layerwise(model, dtype, count, "the native kernels are not built here")
    try:
        spec = read_model(model)
    except ModelError as error:
        return _layerwise(model, dtype, count, f"not known here: {error}")
    from sparseworks.engine.decoder.generating import Decoder

    squares = {} if data is None else _mean_squares(model, data)
    report = pack_model(spec, dtype, head, count, squares.get, progress)
    native = NativeDecoder(spec, cache, count)
    decoder = Decoder(_config(model), native, report, model.generation_config)
    found = _difference(model, decoder)
    limit = max(_TOLERANCES[dtype], _TOLERANCES[head or dtype])
    if cache == "int8":
        limit = max(limit, 0.2)
    if not found <= limit:
        kind = getattr(model.config, "model_type", type(model).__name__)
        reason = (
            f"{kind}: read from its modules it computes something else ({found:.2g} of its logits)"
        )
        return _layerwise(model, dtype, count, reason)
    report.notes.append(
        f"logits differ from the model's by {found:.1e} (relative, on a random text)"
    )
    return decoder


def _layerwise(model: nn.Module, dtype: str, threads: int, why: str) -> LayerwiseDecoder:
    return by_linear_layers(model, dtype in ("int8", "int4"), threads, [why])


def _config(model: nn.Module) -> Any:
    config = copy.deepcopy(model.config)
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "sdpa"
    return config


@torch.no_grad()
def _difference(model: nn.Module, decoder: Any) -> float:
    """|logits - logits'| / |logits - mean| of a random text, the last tokens one by one.

    Without gates: an input at the edge of its rule would make more of a difference than rounding.
    """
    from sparseworks.engine.decoder.generating import Decoder, DecoderCache

    plain = decoder.native
    if any(x.active is not None for x in plain.spec.linears()):
        plain = NativeDecoder(plain.spec, plain.cache, plain.threads, gated=False)
    twin = Decoder(decoder.config, plain, decoder.report, decoder.generation_config)
    generator = torch.Generator().manual_seed(0)
    high = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
    length = min(_TEXT, plain.spec.max_positions)
    ids = torch.randint(0, high, (1, length), generator=generator)
    with evaluating(model), without_gates(model):
        wanted = model(input_ids=ids).logits.float()
    cut = max(1, length - 3)
    past = DecoderCache(plain)
    parts = [twin(ids[:, :cut], cache=past).logits]
    parts += [twin(ids[:, i : i + 1], cache=past).logits for i in range(cut, length)]
    found = torch.cat(parts, 1)
    spread = (wanted - wanted.mean()).norm().clamp_min(1e-30)
    return float((found - wanted).norm() / spread)


@torch.no_grad()
def _mean_squares(model: nn.Module, data: Iterable[Any]) -> dict[str, Tensor]:
    """The mean square of each input of each linear layer."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().flatten(0, -2)
            total = x.square().sum(0)
            sums[name] = total if name not in sums else sums[name] + total
            counts[name] = counts.get(name, 0) + x.shape[0]

        return hook

    hooks = [
        m.register_forward_pre_hook(seen(n))
        for n, m in model.named_modules()
        if type(m) is nn.Linear or type(m).__name__ == "Conv1D"
    ]
    try:
        with evaluating(model):
            for batch in data:
                call(model, split(batch)[0])
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise InvalidArgument("data: no batch reached a linear layer")
    return {name: total / counts[name] for name, total in sums.items()}
