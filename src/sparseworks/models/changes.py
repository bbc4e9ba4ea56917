"""How much the blocks of a model change what passes through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calibration import replay
from sparseworks.models.calls import Batch

__all__ = ["Change", "block_changes"]

Change = Literal["angular", "cosine", "mse", "mae"]


def block_changes(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], change: Change = "angular"
) -> dict[str, float]:
    """Mean over tokens of the change between a block's input x and output y, on the dense model.

    angular: arccos(cos(x, y)) / pi; cosine: 1 - cos(x, y); mse: mean (x - y)^2; mae: mean |x - y|.

    Args:
        model: any.
        names: of the blocks; each takes and returns hidden states `[..., width]` of one shape.
        batches: calibration batches; padded tokens are left out.

    Raises:
        InvalidArgument: no such measure of change.
        ModelError: a block was not run, or its output has another shape than its input.
    """
    if change not in get_args(Change):
        raise InvalidArgument(f"change={change!r}: one of {', '.join(get_args(Change))}")
    sums = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    padding: list[Tensor | None] = [None]

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = first_tensor(args)
            given = first_tensor(kwargs) if given is None else given
            made = first_tensor(output)
            if given is None or made is None or given.shape != made.shape:
                raise ModelError(
                    f"{name}: its output has not the shape of its input, so it is no residual "
                    "block whose change can be measured; use another budget or method"
                )
            x, y = (t.detach().double().reshape(-1, t.shape[-1]) for t in (given, made))
            if padding[0] is not None and padding[0].numel() == x.shape[0]:
                kept = padding[0].flatten().to(x.device)
                x, y = x[kept], y[kept]
            sums[name] += float(_CHANGES[change](x, y).sum())
            counts[name] += x.shape[0]

        return after

    hooks = (model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names)
    replay(model, batches, hooks, padding)
    for name, count in counts.items():
        if not count:
            raise ModelError(f"{name}: the calibration data did not use it")
    return {n: sums[n] / counts[n] for n in names}


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x, y, dim=-1).clamp(-1.0, 1.0)


_CHANGES: dict[str, Any] = {
    "angular": lambda x, y: _cosine(x, y).arccos() / torch.pi,
    "cosine": lambda x, y: 1.0 - _cosine(x, y),
    "mse": lambda x, y: (x - y).square().mean(-1),
    "mae": lambda x, y: (x - y).abs().mean(-1),
}
