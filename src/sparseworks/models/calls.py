"""How a batch is given to a model, and the loss it has when none is named.

A batch is a Tensor (the one input), a mapping (keyword arguments, as tokenizers give them), or a
pair `(inputs, target)` whose inputs are again a Tensor or a mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError

__all__ = ["Batch", "Loss", "batch_size", "call", "default_loss", "logits_of", "move", "token_mask"]

Batch = Tensor | Mapping[str, Any] | tuple[Any, Any] | list[Any]
Loss = Callable[[nn.Module, Batch], Tensor]
_LABELS = ("labels", "label")


def split(batch: Batch) -> tuple[Any, Any]:
    """`(inputs, target)`; the target is None when the batch has none."""
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if len(batch) != 2:
            raise DataError(
                f"a batch that is a {type(batch).__name__} holds (inputs, target), "
                f"not {len(batch)} things; use a mapping for several inputs"
            )
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        target = next((batch[k] for k in _LABELS if k in batch), None)
        return {k: v for k, v in batch.items() if k not in _LABELS}, target
    if isinstance(batch, Tensor):
        return batch, None
    raise DataError(
        f"a batch is a Tensor, a mapping or (inputs, target), not {type(batch).__name__}"
    )


def move(batch: Any, device: torch.device | str) -> Any:
    """The batch with every tensor on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: move(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(v, device) for v in batch)
    return batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for the inputs of a batch (labels are left out)."""
    inputs, _ = split(batch)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def batch_size(batch: Batch) -> int:
    """Number of samples: the first axis of the first tensor."""
    inputs, _ = split(batch)
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    return next((v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 1)


def token_mask(batch: Batch) -> Tensor | None:
    """Bool `[batch, tokens]`, False at padding, or None when nothing is padded."""
    inputs, _ = split(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


def logits_of(output: Any) -> Tensor:
    """The tensor of scores in a model's output.

    Raises:
        DataError: the output holds no tensor of scores.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise DataError(f"no logits in the model's output ({type(output).__name__}); give `loss=`")
    return found


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy: next token for token ids, else against the batch's target.

    Mean over targets; padding (attention mask 0, or label -100) is left out.

    Raises:
        DataError: the batch has no target and no token ids.
    """
    inputs, target = split(batch)
    logits = logits_of(call(model, batch)).float()
    if target is None or (isinstance(inputs, Mapping) and logits.ndim == 3 and _is_causal(model)):
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        labels = target if target is not None else ids
        if labels is None or logits.ndim != 3:
            raise DataError("the batch has no target; give (inputs, target) batches or `loss=`")
        mask = token_mask(batch)
        if target is None and mask is not None:
            labels = labels.masked_fill(~mask, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if logits.ndim == 3 and target.ndim == 2:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return F.cross_entropy(logits, target)


def _is_causal(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return "CausalLM" in type(model).__name__ or bool(getattr(config, "is_decoder", False))
