"""RNN, LSTM, GRU: a hidden unit is its rows in every gate and its place in every layer.

A module has one `hidden_size`, so the units of all its layers and directions go together: unit j of
each. A unit whose rows and biases are zero stays at zero, from its initial state on, in all three
kinds. Time and batch stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseworks.models.coupling.provenance import Block, Labels, Provenance, frozen

if TYPE_CHECKING:
    from sparseworks.models.coupling.calls import Call

__all__ = ["cell", "layers"]


def layers(call: Call) -> list[Provenance]:
    """lstm, gru, rnn_tanh, rnn_relu: outputs `[.., directions * hidden]` and final states."""
    params, states = call["params"], _listed(call["hx"])
    ways, depth = 1 + call["bidirectional"], call["num_layers"]
    each = len(params) // (ways * depth)
    x = call.first("input", "data")
    positions = math.prod(x.shape[:-1])
    source = _last(call, x)
    hidden, out = (_last(call, s) for s in (states[-1], states[0]))
    for layer in range(depth):
        for way in range(ways):
            start = (layer * ways + way) * each
            _one(call, source, hidden, out, params[start : start + each], positions)
        source = np.concatenate([out] * ways)
    ends = [np.concatenate([out] * ways), out, *([hidden] if len(states) > 1 else [])]
    return [_ending(shape, labels) for shape, labels in zip(call.shapes, ends)]


def cell(call: Call) -> Any:
    """lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell: one step of one layer."""
    states = _listed(call["hx"])
    params = [call[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if call[n] is not None]
    hidden, out = (_last(call, s) for s in (states[-1], states[0]))
    source = _last(call, call["input"])
    _one(call, source, hidden, out, params, math.prod(call["input"].shape[:-1]))
    ends = [_ending(shape, labels) for shape, labels in zip(call.shapes, (out, hidden))]
    return ends if len(ends) > 1 else ends[0]


def _one(
    call: Call,
    source: Labels,
    hidden: Labels,
    out: Labels,
    params: Sequence[Provenance],
    positions: int,
) -> None:
    """One layer in one direction. Without a projection `out` and `hidden` are the same units."""
    atoms = call.atoms
    w_ih, w_hh, *rest = params
    projection = rest.pop() if len(rest) % 2 else None
    for tensor in (w_ih, w_hh, *rest):
        rows = atoms.axis(tensor, 0)
        atoms.link(rows.reshape(-1, len(hidden)), hidden)
    atoms.link(source, atoms.axis(w_ih, 1))
    atoms.link(out, atoms.axis(w_hh, 1))
    if projection is None:
        atoms.link(hidden, out)
    else:
        atoms.link(hidden, atoms.axis(projection, 1))
        atoms.link(out, atoms.axis(projection, 0))
        atoms.least.append((hidden, len(out) + 1))  # torch tells a projection by its smaller size
    for weight in (w_ih, w_hh, *([] if projection is None else [projection])):
        call.cost(positions * math.prod(weight.shape), atoms.axis(weight, 0), atoms.axis(weight, 1))


def _listed(states: Any) -> list[Provenance]:
    return list(states) if isinstance(states, (list, tuple)) else [states]


def _last(call: Call, tensor: Provenance) -> Labels:
    """The labels of the last axis; the others stay."""
    for dim in range(len(tensor.shape) - 1):
        call.atoms.freeze(call.atoms.axis(tensor, dim))
    return call.atoms.axis(tensor, len(tensor.shape) - 1)


def _ending(shape: Sequence[int], labels: Labels) -> Provenance:
    last = len(shape) - 1
    fixed = tuple(b for b in frozen(shape).blocks if b.dims != (last,))
    return Provenance(tuple(shape), (*fixed, Block((last,), labels)))
