"""What the inputs of the layers of a model are like, by weight and channel."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from sparseworks.models.calls import Batch, call, split
from sparseworks.models.recurrence import RECURRENT
from sparseworks.models.tap import EvidenceTap, calibration_mode
from sparseworks.models.views import View, view_of

__all__ = ["input_moments", "watch_inputs"]


def input_moments(model: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and mean square per input channel of the weights that `watch_inputs` sees, by name."""
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        new = [x.sum(0), x.square().sum(0), torch.tensor(float(len(x)))]
        old = sums.get(name)
        sums[name] = new if old is None else [a + b for a, b in zip(old, new)]

    watch_inputs(model, batches, see)
    return {n: (a / c, b / c) for n, (a, b, c) in sums.items()}


def watch_inputs(
    model: nn.Module,
    batches: Iterable[Batch],
    see: Callable[[str, Tensor], None],
    names: Container[str] | None = None,
) -> None:
    """Run the model; `see(name, x)` gets the input `[positions, channels]` (fp64) of the weight of
    every plain Linear and ungrouped convolution, and of every recurrent layer (what is multiplied
    with its hidden states too), or of those in `names`."""
    recurrent: list[View] = []

    def hook(name: str, channel: int):  # type: ignore[no-untyped-def]
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().movedim(channel, -1)
            see(name, x.reshape(-1, x.shape[-1]))

        return before

    handles = []
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, RECURRENT):
            found = [view_of(module, a, dot + a) for a in module._parameters]
            recurrent += [v for v in found if v and (names is None or v.name in names)]
        name = dot + "weight"
        if names is not None and name not in names:
            continue
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name, -1)))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            rank = module.weight.ndim
            handles.append(module.register_forward_pre_hook(hook(name, 1 - rank)))
    tap = EvidenceTap(recurrent, lambda view, x, *_: see(view.name, x.detach().double()))
    try:
        with calibration_mode(model), tap if recurrent else nullcontext():
            for batch in batches:
                inputs, _ = split(batch)
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
