"""Top-k Transformer (Li et al. 2023, The Lazy Neuron Phenomenon: On Emergence of Activation
Sparsity in Transformers, ICLR 2023, arXiv:2210.06313): the k largest hidden units of a token count.

    y = W_out TopK_k(a),   a = ReLU(W_in x)

per token, values kept, the rest 0, gradients through kept units only; the same k in all layers from
the first step, no other loss. W_in stays dense, W_out needs k of its columns. On units of other
activation functions the largest |a| are kept.

The study behind it: ordinary training alone makes most ReLU units 0. `unit_densities` measures that
(and tells units that are never active from those that differ between inputs), `first_gradient` is
the reason at initialisation: for W_out with independent entries of mean 0 and variance v, C classes
and cross-entropy, to first order

    E[dloss / da_j | a] = v a_j (1 - 1/C) > 0,

so that descent lowers active units whatever the data. No official code is known.

In our quick setting (claim 050: a byte decoder, 400 steps) density falls from 0.50 to 0.33 in MLPs
of 256 units and to 0.32 in those of 1,024, a difference of 0.018 (0.004 to 0.033) that held-out
text shows too; keeping 2 to 10 % of the units loses nothing. With permuted
targets it is another thing that looks like sparsity: more than half of the units die.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Job
from sparseworks.activations.method import ActivationMethod, mlp_ends
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import ActiveInputs, Gate, InputGate
from sparseworks.models.calibration import replay
from sparseworks.models.calls import Batch

__all__ = ["LazyNeuron", "UnitDensity", "first_gradient", "unit_densities"]


@dataclass(frozen=True)
class LazyNeuron(ActivationMethod):
    """The k = floor(d_ff (1 - s)) largest hidden units of each token, at least one.

    Put the gates on an untrained model and train it: gates stay on, gradients pass kept units.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="lazy-neuron",
        title="The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
        authors="Li et al.",
        year=2023,
        card="050",
        room="activations",
        kind="activation",
        needs=("data",),
        pattern="neurons of a token",
        tensors="inputs of the last matrices of MLPs",
        cost="none before training; made for training from scratch",
        summary="only the k largest hidden units of each token count, in training too",
    )

    def gates(self, job: Job) -> dict[str, Gate]:
        found: dict[str, Gate] = {}
        for view in mlp_ends(job):
            width = view.shape[1]
            keep = max(1, int(width * (1 - job.sparsity) + 1e-9))
            found[view.module_name] = InputGate(ActiveInputs(keep=keep, share=keep / width))
        return found


@dataclass(frozen=True, eq=False)
class UnitDensity:
    """How often the hidden units of one MLP are above 0.

    Args:
        name: of the module that reads them.
        frequency: `[units]`, share of the tokens for which each is.
    """

    name: str
    frequency: Tensor

    @property
    def density(self) -> float:
        """Share of all entries."""
        return float(self.frequency.mean())

    @property
    def dead(self) -> float:
        """Share of the units that never are."""
        return float((self.frequency == 0).double().mean())

    @property
    def live_density(self) -> float:
        """Share of the entries of the other units."""
        live = self.frequency[self.frequency > 0]
        return float(live.mean()) if live.numel() else 0.0


@torch.no_grad()
def unit_densities(
    model: nn.Module, modules: Sequence[str], batches: Iterable[Batch]
) -> list[UnitDensity]:
    """Of what modules read in evaluation mode, over all tokens of the batches.

    Exact zeros are what ReLU gives; a smooth activation function has none, and its units above 0
    mean little.

    Args:
        modules: names of the last matrices of MLPs.
        batches: as the model takes them.
    """
    counts: dict[str, Tensor] = {}
    tokens = dict.fromkeys(modules, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            a = args[0].detach().flatten(0, -2) > 0
            counts[name] = counts.get(name, 0) + a.sum(0)
            tokens[name] += len(a)

        return hook

    hooks = (model.get_submodule(n).register_forward_pre_hook(count(n)) for n in modules)
    replay(model, batches, hooks)
    return [UnitDensity(n, counts[n].double() / tokens[n]) for n in modules]


def first_gradient(a: Tensor, variance: float, classes: int) -> Tensor:
    """E[dloss / da | a] of cross-entropy on logits V a, to first order in the variance of V.

    Args:
        a: hidden units `[..., units]`.
        variance: of the independent entries of V `[classes, units]`, of mean 0.
    """
    return variance * (1 - 1 / classes) * a
