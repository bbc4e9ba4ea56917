"""Recurrent layers: their gates, and the products that their fused operations hide.

A layer of `nn.LSTM`, `nn.GRU` or `nn.RNN` multiplies `weight_ih` with its inputs x_t, `weight_hh`
with the hidden state h_{t-1} before each step (x and h swapped in time for the reverse direction),
and, in an LSTM with projections, `weight_hr` with o_t * tanh(c_t), where

    i, f, g, o = sigma, sigma, tanh, sigma of weight_ih x_t + weight_hh h_{t-1} + biases,
    c_t = f c_{t-1} + i g.

The operation runs as it always does, one layer at a time, so its outputs are h_t; the products are
then done once more over all steps together, where whoever listens to products sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["RECURRENT", "gates_of", "is_weight", "products_shown", "relist"]

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_LAYERS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)


def gates_of(module: nn.Module) -> int:
    """Rows of `weight_ih` and `weight_hh` that one hidden unit of a recurrent module has."""
    if isinstance(module, nn.LSTMCell) or getattr(module, "mode", "") == "LSTM":
        return 4
    return 3 if isinstance(module, nn.GRUCell) or getattr(module, "mode", "") == "GRU" else 1


def is_weight(module: nn.Module, attribute: str) -> bool:
    """Is this the name of a matrix of a recurrent module?"""
    if not isinstance(module, RECURRENT) or not attribute.startswith("weight_"):
        return False
    return attribute in getattr(module, "_flat_weights_names", ("weight_ih", "weight_hh"))


def relist(modules: Iterable[nn.Module]) -> None:
    """Give the fused calls of recurrent layers the parameters that these modules have now."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


@contextmanager
def products_shown() -> Iterator[None]:
    """Every product with a parameter is a matrix product that dispatch modes see, and function
    modes that were entered before.

    Attention without its fused path; recurrent layers show their products beside the fused call.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _Shown():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _hidden() -> Iterator[None]:
    """No mode sees what is computed here."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class _Shown(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LAYERS and not kwargs:
            return _layers(func, *args)
        if func in _CELLS and not kwargs:
            with _hidden():
                out = func(*args)
            x, states, w_ih, w_hh = args[:4]
            F.linear(x, w_ih)
            F.linear(states if isinstance(states, Tensor) else states[0], w_hh)
            return out
        return func(*args, **(kwargs or {}))


def _layers(func: Any, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """torch.lstm, gru, rnn_tanh, rnn_relu in either of their forms, layer by layer."""
    packed = isinstance(args[2], (list, tuple))  # (sizes, states, params, ...) or (states, params,)
    sizes, (states, params, biases, layers, dropout, train, two_ways, *first) = (
        (args[0], args[1:]) if packed else (None, args)
    )
    both = [states] if isinstance(states, Tensor) else list(states)
    ways, each = 1 + two_ways, len(params) // layers
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        own = [s[layer * ways : (layer + 1) * ways] for s in both]
        weights = params[layer * each : (layer + 1) * each]
        given = own[0] if isinstance(states, Tensor) else own
        form = [given, weights, biases, 1, 0.0, train, two_ways, *first]
        with _hidden():
            y, *last = func(x, *([sizes] if packed else []), *form)
        _show(x, y, own, weights, biases, ways, sizes, bool(first and first[0]))
        finals.append(tuple(last))
        x = F.dropout(y, dropout, train) if layer + 1 < layers else y
    return (x, *(torch.cat(f) for f in zip(*finals)))


def _show(
    x: Tensor,
    y: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    biases: bool,
    ways: int,
    batch_sizes: Tensor | None,
    batch_first: bool,
) -> None:
    """The products of one layer, whose outputs are known."""
    each = len(params) // ways
    if batch_sizes is None and batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    sizes = [x.shape[1]] * len(x) if batch_sizes is None else batch_sizes.tolist()
    rows = [t if batch_sizes is not None else t.flatten(0, 1) for t in (x, y)]

    def product(inputs: Tensor, weight: Tensor) -> None:
        if batch_sizes is None:  # samples first, as masks of padded tokens are
            inputs = inputs.view(len(sizes), -1, inputs.shape[-1]).transpose(0, 1).flatten(0, 1)
        F.linear(inputs, weight)

    for way, outputs in enumerate(rows[1].chunk(ways, dim=-1)):
        w_ih, w_hh, *rest = params[way * each : (way + 1) * each]
        with _hidden():
            before = _before(outputs, states[0][way], sizes, way == 1)
        product(rows[0], w_ih)
        product(before, w_hh)
        if len(rest) in (1, 3):  # a projection, with or without biases
            with _hidden():
                gates = F.linear(rows[0], w_ih) + F.linear(before, w_hh)
                gates = gates + rest[0] + rest[1] if biases else gates
                cells = _cells(gates, states[1][way], sizes, way == 1)
            product(cells, rest[-1])


def _before(h: Tensor, first: Tensor, sizes: Sequence[int], reverse: bool) -> Tensor:
    """h_{t-1} (h_{t+1} in reverse) of every row of packed steps of `sizes` samples each."""
    steps = torch.split(h, list(sizes))
    parts = []
    for t, size in enumerate(sizes):
        if reverse:  # samples that end here start from their initial state
            there = steps[t + 1] if t + 1 < len(steps) else h[:0]
            parts += [there, first[len(there) : size]]
        else:
            parts.append(steps[t - 1][:size] if t else first[:size])
    return torch.cat(parts)


def _cells(gates: Tensor, first: Tensor, sizes: Sequence[int], reverse: bool) -> Tensor:
    """o_t * tanh(c_t) of every row."""
    steps = list(enumerate(torch.split(gates, list(sizes))))
    found = [gates[:0]] * len(steps)
    cell = first[: 0 if reverse else sizes[0]]
    for t, step in reversed(steps) if reverse else steps:
        if len(cell) < len(step):
            cell = torch.cat([cell, first[len(cell) : len(step)]])
        i, f, g, o = step.chunk(4, dim=-1)
        cell = f.sigmoid() * cell[: len(step)] + i.sigmoid() * g.tanh()
        found[t] = o.sigmoid() * cell.tanh()
    return torch.cat(found)
