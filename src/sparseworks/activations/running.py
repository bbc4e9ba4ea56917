"""`sparse_activations`: calibrate a method and put its gates on a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseworks.activations.allocation import greedy
from sparseworks.activations.calibrating import Job
from sparseworks.activations.files import read_gates, write_gates
from sparseworks.activations.method import ActivationMethod, InputMethod
from sparseworks.activations.r_sparse import LowRankGate
from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.kinds import check_kind
from sparseworks.core.registry import build, options_of, resolve
from sparseworks.core.types import Progress
from sparseworks.models.active import Gate, RuledGate, gates
from sparseworks.models.calls import Batch
from sparseworks.models.modes import evaluating
from sparseworks.models.views import find_prunable

__all__ = ["SparseActivations", "load_activations", "sparse_activations"]


@dataclass(frozen=True)
class LayerShare:
    """What one gate did.

    Attributes:
        share: of the entries that it let through.
        needed: weights that an average token touched, those of a low-rank part included.
        weights: that a token touches without it.
    """

    name: str
    share: float
    needed: float
    weights: int


class SparseActivations:
    """Gates on a model, until `remove`.

    Attributes:
        model: as it was given.
        method, options: by which it was made.
        gates: by the name of the module that each is on.
    """

    def __init__(self, model: nn.Module, method: str, options: Mapping[str, Any],
                 found: Mapping[str, Gate]) -> None:  # fmt: skip
        self.model, self.method, self.options = model, method, dict(options)
        self.gates = dict(found)
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        try:
            for name, gate in self.gates.items():
                self._handles += gate.attach(self.model.get_submodule(name))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the gates off; the model computes what it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without gates for a while."""
        self.remove()
        try:
            yield
        finally:
            self._attach()

    def reset(self) -> None:
        """Count from the start."""
        for gate in self.gates.values():
            gate.passed = gate.seen = 0

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the gates learn, for an optimizer beside the model's."""
        for gate in self.gates.values():
            yield from gate.parameters()

    def penalty(self) -> Tensor:
        """What the last forward pass adds to a loss; 0 of gates that have none."""
        found = [p for g in self.gates.values() if (p := g.penalty()) is not None]
        if found:
            return torch.stack(found).sum()
        return torch.zeros((), device=next(self.model.parameters()).device)

    def layers(self) -> list[LayerShare]:
        """What each gate let through since `reset`."""
        found = []
        for name, gate in self.gates.items():
            share = gate.passed / gate.seen if gate.seen else 1.0
            weights = _covered(self.model, name)
            extra = gate.extra if isinstance(gate, LowRankGate) else 0
            found.append(LayerShare(name, share, share * weights + extra, weights))
        return found

    @property
    def density(self) -> float:
        """Weights that tokens touched, of those that the gates govern, since `reset`."""
        layers = self.layers()
        return sum(x.needed for x in layers) / max(1, sum(x.weights for x in layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gates as a small safetensors file, for `load_activations`.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_gates(path, self.method, self.options, self.gates)

    def __str__(self) -> str:
        width = max((len(n) for n in self.gates), default=0)
        lines = [f"{self.method}: {self.density:.1%} of the weights behind {len(self.gates)} gates"]
        lines += [f"  {x.name:<{width}}  {x.share:7.2%} active" for x in self.layers()]
        return "\n".join(lines)


def _covered(model: nn.Module, name: str) -> int:
    """Weights that go with the entries of one gate: the columns of a layer, or of an activation
    inside a gated MLP the rows of `up_proj` and the columns of `down_proj`."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if weight is not None:
        return int(weight.numel())
    owner = model.get_submodule(name.rpartition(".")[0])
    return int(owner.up_proj.weight.numel() + owner.down_proj.weight.numel())  # type: ignore[union-attr,operator]


def sparse_activations(
    model: nn.Module,
    method: str | ActivationMethod = "teal",
    *,
    sparsity: float = 0.5,
    data: Iterable[Batch],
    allocation: Literal["uniform", "greedy"] = "uniform",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    tokens: int = 4096,
    progress: Progress | None = None,
    **options: Any,
) -> SparseActivations:
    """Set the entries of activations that matter least to 0, token by token.

    Thresholds are calibrated on the model as it is, block by block. Hooks apply them, to prompts
    and single tokens alike; `compile_decoder` then reads only the columns of active inputs (rules
    for inputs of `teal`, `wina`, `sparsing-law` and `lazy-neuron`, with `per="input"` where layers
    share theirs). Those made for training stay on while the model trains; what they learn is in
    `parameters()` of what is returned, what they add to the loss in `penalty()`.

    Args:
        model: any module with linear layers; weights are not changed.
        method: registered name or object.
        sparsity: share of the entries that are set to 0 on the calibration data.
        data: batches as the model takes them.
        allocation: "uniform", or "greedy": layer by layer where it costs a block least (TEAL's),
            with `sparsity` the mean over the weights of a block.
        include, exclude: name patterns of linear layers.
        tokens: of calibration data that are looked at in each layer.
        progress: told of long work.
        **options: of the method.

    Returns:
        The gates, which are on the model until `remove()`.

    Raises:
        InvalidArgument: a sparsity outside [0, 1), or options that do not fit.
        ModelError: no linear layer, a model with gates, or one that the method does not fit.
        DataError: data that reaches no linear layer, or gives NaN.
    """
    made = build(method, **options)
    check_kind(type(made), ("activation",))
    assert isinstance(made, ActivationMethod)
    if not 0 <= sparsity < 1:
        raise InvalidArgument(f"sparsity={sparsity} must be in [0, 1)")
    if allocation not in ("uniform", "greedy"):
        raise InvalidArgument(f"allocation={allocation!r}: use 'uniform' or 'greedy'")
    if allocation == "greedy" and not isinstance(made, InputMethod):
        raise InvalidArgument(f"allocation='greedy' is for inputs; {made.info.name} has others")
    if tokens < 1:
        raise InvalidArgument(f"tokens={tokens} must be at least 1")
    taken = next((n for n, m in model.named_modules() if any(gates(m))), None)
    if taken is not None:
        raise ModelError(f"{taken} has a gate already; remove() the first ones")
    views = [
        v for v in find_prunable(model, include, exclude)
        if v.layout in made.layouts and v.groups == 1
    ]  # fmt: skip
    if not views:
        raise ModelError(f"{type(model).__name__} has no layer to make sparse inputs for")
    batches = list(data)
    if not batches:
        raise DataError("data= has no batch")
    job = Job(model, views, batches, sparsity, tokens, progress)
    with evaluating(model), torch.no_grad():
        if allocation == "greedy":
            assert isinstance(made, InputMethod)
            found = greedy(made, job)
        else:
            found = made.gates(job)
    about = {"sparsity": sparsity, "allocation": allocation, **options_of(made)}
    return SparseActivations(model, made.info.name, about, found)


def load_activations(path: str | os.PathLike[str], model: nn.Module) -> SparseActivations:
    """Put gates that `SparseActivations.save` wrote on a model.

    Raises:
        CheckpointError: not such a file, or damaged.
        ModelError: they are for another model, or it has gates already.
    """
    method, options, found = read_gates(path)
    resolve(method)
    modules = dict(model.named_modules())
    for name, gate in found.items():
        if name not in modules:
            raise ModelError(f"{path}: the model has no module {name}")
        if any(gates(modules[name])):
            raise ModelError(f"{name} has a gate already; remove() the first ones")
        size = getattr(modules[name], "in_features", None)
        weight = gate.rule.weight if isinstance(gate, RuledGate) else None
        if weight is not None and size is not None and weight.numel() != size:
            raise ModelError(f"{path}: {name} has {size} inputs, the gate {weight.numel()}")
    return SparseActivations(model, method, options, found)
