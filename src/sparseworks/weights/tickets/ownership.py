"""Ownership of a sparse network, proven from its zeros.

Source: Chen et al. 2021, You are caught stealing my winning lottery ticket! Making a lottery ticket
claim its ownership.

Scheme "code": a code that only the owner's text gives is written into the mask, and the ticket is
trained from its rewound weights; whoever gets the weights finds the code in them. Scheme "key": the
kernels on the strongest paths are withheld; what is released trains to a lower accuracy.

With b_ij the bits of the code, size x size, bit 1 where kernel (r + i, c + j) of a layer keeps
weights and 0 where it is empty, the place (layer, r, c) is the one where

    agreement(r, c) = sum_ij [any(m_(r+i)(c+j)) = b_ij]

is largest, and the mask is changed there alone; the error rate of a suspect is 1 - agreement /
size^2 at that place.

In our quick setting (claim 006: ResNet-8 on digits, 80 % sparse, 8 seeds) the code stays exact
through training and costs 0.1 points of accuracy, but pruning another 10 % turns 15 % of its bits
(5 % turns 11 %), more than the 4 % promised: leave room for errors when a ticket is compared. That
withheld kernels cost accuracy could not be shown there (-0.1 points against random ones, -0.7 to
0.5).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from sparseworks.core.budgets import Budget
from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.masks import Masks, masks
from sparseworks.core.registry import MethodInfo
from sparseworks.io.sealed import sealed, unsealed
from sparseworks.training.experiment import Driver, Experiment
from sparseworks.training.runs import Finished
from sparseworks.weights.tickets.keys import matched_split, split
from sparseworks.weights.tickets.signatures import Code, Embedding, Place, Verdict, embed, verify

__all__ = ["Certificate", "Ownership"]

_FORMAT = 1


@dataclass(frozen=True)
class Certificate:
    """What an owner keeps secret until there is a dispute.

    Args:
        owner: the text whose code was written.
        size: of the code.
        name: of the weight that hosts it.
        row: first output channel.
        column: first input channel.
    """

    owner: str
    size: int
    name: str
    row: int
    column: int

    def verify(self, model: nn.Module) -> Verdict:
        """Compare the zeros of a model's weights with the code; no mask record is needed.

        Raises:
            ModelError: the model has no such weight.
        """
        hosts: dict[str, Tensor] = {
            n: p.detach().cpu() for n, p in model.named_parameters() if p.dim() > 2
        }
        return verify(
            hosts, Code.of_text(self.owner, self.size), Place(self.name, self.row, self.column)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        from sparseworks.io.atomic import atomic_file

        with atomic_file(Path(path)) as place:
            said = sealed({"format": _FORMAT, **asdict(self)})
            place.write_text(json.dumps(said, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is not a certificate.
        """
        try:
            said = unsealed(json.loads(Path(path).read_text()))
            if said.pop("format") != _FORMAT:
                raise ValueError("another format")
            found = cls(**said)
            wanted = {"owner": str, "name": str, "size": int, "row": int, "column": int}
            if any(type(getattr(found, n)) is not kind for n, kind in wanted.items()):
                raise ValueError("a field of another type")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not an ownership certificate ({error!r})") from None
        return found


@dataclass(frozen=True)
class Ownership(Driver):
    """Mark a ticket as one's own, and train it.

    The model is given with the weights that the ticket is trained from.

    Args:
        owner: a text that proves who wrote it ("Jane Doe, 2026-11-21, 3f9a...").
        ticket: the masks; None: those of the model (whose masked weights are 0, so positions that
            the code enables start there).
        scheme: "code" trains the run "marked", "key" the run "released".
        size: of the code, which needs a convolution with as many output and input channels.
        walks: of the key: more withhold more kernels.
        certificate: file that tells where the code is, written before the training; the same
            arguments always give the same place.
        controls: also train the ticket as it was ("unmarked", "whole"), and with scheme "key" the
            ticket without as many random kernels of the same sizes.
    """

    owner: str = ""
    ticket: Masks | None = field(default=None, compare=False, repr=False)
    scheme: Literal["code", "key"] = "code"
    size: int = 29
    walks: int = 1000
    certificate: str | None = None
    controls: bool = False

    budget: str | Mapping[str, float] | Budget = field(default="global", kw_only=True)
    info: ClassVar[MethodInfo] = MethodInfo(
        name="ownership",
        title="You are caught stealing my winning lottery ticket! Making a lottery ticket claim "
        "its ownership",
        authors="Chen et al.",
        year=2021,
        card="006",
        room="weights",
        kind="driver",
        needs=("training",),
        pattern="that of the ticket",
        budget="that of the ticket",
        tensors="convolutions",
        cost="one training",
        summary="an owner's code in the empty kernels of a ticket, or kernels withheld as a key",
        command="sparseworks tickets MODEL --data DATA --method ownership --start SPARSE "
        "--option owner=OWNER --out OUT",
    )

    def __post_init__(self) -> None:
        if self.scheme not in ("code", "key") or self.size < 2 or self.walks < 1:
            raise InvalidArgument(
                f"ownership: scheme={self.scheme!r} must be 'code' or 'key', size={self.size} at "
                f"least 2, walks={self.walks} at least 1"
            )
        if self.scheme == "key" and self.certificate is not None:
            raise InvalidArgument(
                "ownership: a certificate says where a code is; a key is found again from the "
                "weights, the ticket, `walks` and the seed (scheme 'key' writes none)"
            )

    def run(self, experiment: Experiment) -> Finished:
        if not self.owner:
            raise InvalidArgument("ownership: give `owner`, a text that proves who wrote it")
        ticket = masks(experiment.model) if self.ticket is None else self.ticket
        if ticket is None or not len(ticket):
            raise InvalidArgument(
                "ownership needs a ticket: give `ticket=`, or a model with masks (of `prune`, or "
                "of an experiment with 'rewinding')"
            )
        ticket.check(experiment.model)
        return (
            self._code(experiment, ticket)
            if self.scheme == "code"
            else self._key(experiment, ticket)
        )

    def _code(self, experiment: Experiment, ticket: Masks) -> Finished:
        done: Embedding = embed(ticket, Code.of_text(self.owner, self.size), seed=experiment.seed)
        place = done.place
        proof = Certificate(self.owner, self.size, place.name, place.row, place.column)
        if self.certificate is not None:
            proof.save(self.certificate)
        experiment.total = 1 + self.controls
        marked = experiment.train("marked", record=done.masks)
        runs = {"": marked}
        if self.controls:
            runs[" of the unmarked ticket"] = experiment.train("unmarked", record=ticket)
        figures: dict[str, Any] = {"bits of the mask changed": float(done.changed)}
        for which, run in runs.items():
            verdict = proof.verify(run.into(experiment.fresh()))
            figures[f"error rate{which}"] = verdict.error_rate
            figures[f"chance{which}"] = verdict.chance
        experiment.figures.update(figures)
        return marked

    def _key(self, experiment: Experiment, ticket: Masks) -> Finished:
        seed = experiment.seed
        parts = split(experiment.fresh(), ticket, walks=self.walks, seed=seed)
        kept = sum(ticket.entry(n).kept for n in ticket)
        experiment.figures["share of weights withheld"] = parts.withheld / max(1, kept)
        experiment.total = 1 + 2 * self.controls
        released = experiment.train("released", record=parts.released)
        if self.controls:
            control = matched_split(ticket, parts.key, seed=seed)
            experiment.train("without random kernels", record=control.released)
            experiment.train("whole", record=ticket)
        return released
