"""How a model is called: with the arguments of an example, or with a batch of data.

An *example* says what `model(...)` is called with: a tensor, a tuple or list of positional
arguments, or a mapping of keyword arguments. It becomes `Arguments`.

A *batch* of data may hold a target too: a Tensor (the one input), a mapping (keyword arguments, as
tokenizers give them, and labels), or a pair `(inputs, target)` whose inputs are again a Tensor or a
mapping. Where a batch is taken, `Arguments` are taken too, as a batch without a target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, InvalidArgument

__all__ = [
    "Arguments",
    "Batch",
    "Example",
    "Loss",
    "TaskLoss",
    "batch_size",
    "call",
    "default_loss",
    "few_tokens",
    "first_sample",
    "logits_of",
    "loss_of",
    "move",
    "scored",
    "signature_of",
    "token_mask",
]


@dataclass(frozen=True)
class Arguments:
    """What a model is called with: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example) -> Arguments:
        """The arguments that an example says.

        Raises:
            InvalidArgument: not a tensor, a tuple, a list, or a mapping of keywords.
        """
        if isinstance(example, Arguments):
            return example
        if isinstance(example, Tensor):
            return cls((example,))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example))
        if isinstance(example, Mapping) and all(isinstance(k, str) for k in example):
            return cls((), dict(example))
        raise InvalidArgument(
            "an example is a tensor, a tuple or list of positional arguments, or a mapping of "
            f"keyword arguments, not {type(example).__name__}"
        )

    @classmethod
    def of_batch(cls, batch: Batch) -> Arguments:
        """The arguments that the inputs of a batch are; its target and labels are left out."""
        inputs, _ = split(batch)
        if isinstance(inputs, Arguments):
            return inputs
        return cls((), inputs) if isinstance(inputs, Mapping) else cls((inputs,))

    @property
    def values(self) -> list[Any]:
        """Positional arguments, then those with names."""
        return [*self.args, *self.kwargs.values()]

    def bound(self, model: nn.Module) -> inspect.BoundArguments:
        """By the names of the model's own parameters.

        Raises:
            InvalidArgument: the model does not take these arguments.
        """
        try:
            return signature_of(model).bind(*self.args, **self.kwargs)
        except TypeError as error:
            pair = len(self.args) == 2 and not self.kwargs
            hint = "; of a pair (inputs, target) the example is the inputs" if pair else ""
            raise InvalidArgument(
                f"the example does not fit {type(model).__name__}: {error}{hint}"
            ) from None

    def named(self, model: nn.Module) -> Arguments:
        """The same call with every argument named that can be, where there are several.

        Raises:
            InvalidArgument: the model does not take these arguments.
        """
        bound = self.bound(model)
        if len(self.values) < 2:
            return self
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        parameters = signature_of(model).parameters
        rest = any(parameters[n].kind is inspect.Parameter.VAR_POSITIONAL for n in bound.arguments)
        for name, value in bound.arguments.items():
            kind = parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(value)
            elif kind is inspect.Parameter.POSITIONAL_ONLY or (
                rest and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            ):
                args.append(value)
            else:
                kwargs[name] = value
        return Arguments(tuple(args), kwargs)

    def batch(self) -> Batch:
        """As a batch without a target: a lone input or a mapping where it is one."""
        if not self.args:
            return self.kwargs
        return self.args[0] if len(self.values) == 1 else self


Example = Tensor | Mapping[str, Any] | tuple[Any, ...] | list[Any] | Arguments
Batch = Tensor | Mapping[str, Any] | tuple[Any, Any] | list[Any] | Arguments
Loss = Callable[[nn.Module, Batch], Tensor]
TaskLoss = Callable[[nn.Module, Batch, Tensor], Tensor]
"""`(model, batch, logits) -> scalar`."""
_LABELS = ("labels", "label")


def signature_of(model: nn.Module) -> inspect.Signature:
    """Of the model's forward, without annotations; `(*args, **kwargs)` where it tells none."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **kwargs: None)
    return inspect.Signature([p.replace(annotation=p.empty) for p in parameters])


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
    if isinstance(batch, (Tensor, Arguments)):
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
    if isinstance(batch, Arguments):
        return Arguments(move(batch.args, device), move(batch.kwargs, device))
    return batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for the inputs of a batch (labels are left out)."""
    given = Arguments.of_batch(batch)
    return model(*given.args, **given.kwargs)


def batch_size(batch: Batch) -> int:
    """Number of samples: the first axis of the first tensor."""
    values = Arguments.of_batch(batch).values
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim), 1)


def first_sample(batch: Batch) -> Batch:
    """A batch of the first sample alone, without its target."""
    count = batch_size(batch)

    def cut(value: Any) -> Any:
        same = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count
        return value[:1] if same else value

    given = Arguments.of_batch(batch)
    kwargs = {k: cut(v) for k, v in given.kwargs.items()}
    return Arguments(tuple(cut(v) for v in given.args), kwargs).batch()


def few_tokens(batch: Batch, count: int) -> Batch:
    """The first tokens alone, where a batch is token ids and their mask and nothing else."""
    given = Arguments.of_batch(batch)
    ids = given.kwargs.get("input_ids")
    plain = not given.args and given.kwargs.keys() <= {"input_ids", "attention_mask"}
    if not plain or not isinstance(ids, Tensor) or ids.ndim != 2:
        return batch
    if any(not isinstance(v, Tensor) or v.shape != ids.shape for v in given.kwargs.values()):
        return batch
    return {k: v[:, :count] for k, v in given.kwargs.items()}


def token_mask(batch: Batch) -> Tensor | None:
    """Bool `[batch, tokens]`, False at padding, or None when nothing is padded."""
    mask = Arguments.of_batch(batch).kwargs.get("attention_mask")
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
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
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
    return loss_of(model, batch, logits_of(call(model, batch)))


def loss_of(model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
    """`default_loss` of a model whose logits for the batch are known."""
    scores, labels = scored(model, batch, logits)
    return F.cross_entropy(scores.float(), labels)


def scored(model: nn.Module, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of logits that have a target, as far as the shape tells, and those targets.

    Returns:
        logits `[rows, classes]` (of images, `[rows, classes, ...]`) and labels, -100 where a row
        has none.

    Raises:
        DataError: the batch has no target and no token ids.
    """
    _, target = split(batch)
    named = Arguments.of_batch(batch).kwargs
    if target is None or (named and logits.ndim == 3 and _is_causal(model)):
        ids = named.get("input_ids")
        labels = target if target is not None else ids
        if labels is None or logits.ndim != 3:
            raise DataError("the batch has no target; give (inputs, target) batches or `loss=`")
        mask = token_mask(batch)
        if target is None and mask is not None:
            labels = labels.masked_fill(~mask, -100)
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if logits.ndim == 3 and target.ndim == 2:
        return logits.flatten(0, 1), target.flatten()
    return logits, target


def _is_causal(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return "CausalLM" in type(model).__name__ or bool(getattr(config, "is_decoder", False))
