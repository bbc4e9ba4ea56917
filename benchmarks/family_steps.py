"""The steps that a model of a family goes through in `every_family.py`, and the laws that hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparseworks as sw
from model_families import Family
from sparseworks.core.errors import SparseworksError
from sparseworks.engine.graph import capture
from sparseworks.engine.measuring import difference, tensors_of
from sparseworks.engine.plan import make_plan
from sparseworks.weights.structured import load_slim, save_slim
from sparseworks.weights.structured.checking import check
from sparseworks.weights.structured.cutting import zero

__all__ = ["Broken", "Note", "Steps", "require"]

SPARSITY, SHARE = 0.5, 0.7
SLIM_TOLERANCE, PROGRAM_TOLERANCE = 2e-3, 1e-3
Note = dict[str, Any]


class Broken(Exception):
    """A law that does not hold."""


def require(law: bool, what: str) -> None:
    if not law:
        raise Broken(what)


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    found = tensors_of(model(**given))
    require(bool(found), "the model returns no tensor")
    return found


def same_bits(name: str, expected: list[Tensor], found: list[Tensor]) -> None:
    require(len(expected) == len(found), f"{name}: another number of tensors")
    for a, b in zip(expected, found):
        require(a.shape == b.shape and torch.equal(raw(a), raw(b)), f"{name}: other bits")


class Steps:
    """The steps of one family, and what they hand on."""

    def __init__(self, name: str, family: Family, work: Path) -> None:
        self.name, self.family, self.work = name, family, work
        self.example, self.other = family.inputs(2, 1), family.inputs(3, 9)
        self.sparse: nn.Module | None = None

    def pruned(self, method: str, **more: Any) -> tuple[nn.Module, nn.Module, Note]:
        """(before, after, what was done); the laws of every method."""
        before = self.family.make()
        done = sw.prune(before, method, sparsity=SPARSITY, copy=True, **more)
        model: nn.Module = done.model
        masks = sw.masks(model)
        require(masks is not None and len(masks) > 0, "no masks")
        old, new = dict(before.named_parameters()), dict(model.named_parameters())
        zeros = weights = 0
        for name in masks:
            kept, was, now = masks[name], old[name].detach(), new[name].detach()
            require(torch.equal(now[kept], was[kept]), f"{name}: a kept weight changed")
            require(not bool(now[~kept].any()), f"{name}: a masked weight is not 0")
            zeros, weights = zeros + int((~kept).sum()), weights + kept.numel()
        require(abs(zeros / weights - SPARSITY) < 0.01, f"{zeros / weights:.3f} are zero")
        for name in old.keys() - set(masks):
            require(
                torch.equal(raw(old[name]), raw(new[name])), f"{name}: has no mask, but changed"
            )
        return before, model, {"tensors": len(masks), "weights": weights}

    def magnitude(self) -> Note:
        before, model, note = self.pruned("magnitude")
        masks = sw.masks(model)
        for name, was in before.named_parameters():
            if name in masks:
                size, kept = was.detach().abs(), masks[name]
                law = float(size[~kept].max()) <= float(size[kept].min())
                require(law, f"{name}: a zeroed weight was larger than a kept one")
        return note

    def wanda(self) -> Note:
        data = [self.family.inputs(4, seed) for seed in (3, 4)]
        _, self.sparse, note = self.pruned("wanda", data=data)
        return note

    def _reread(self, found: nn.Module) -> None:
        expected = self._sparse()
        a, b = expected.state_dict(), found.state_dict()
        require(a.keys() == b.keys(), "other names")
        same_bits("the state", list(a.values()), [b[n] for n in a])
        record, again = sw.masks(expected), sw.masks(found)
        require(again is not None and set(record) == set(again), "other masks")
        require(all(torch.equal(record[n], again[n]) for n in record), "other masks")
        wanted = outputs(expected, self.example)
        same_bits("the outputs", wanted, outputs(found.eval(), self.example))

    def _sparse(self) -> nn.Module:
        require(self.sparse is not None, "no sparse model")
        return self.sparse  # type: ignore[return-value]

    def file(self) -> Note:
        path = self.work / "model.safetensors"
        sw.save(self._sparse(), path)
        self._reread(sw.load(path, self.family.make(seed=1)))
        dense = sum(t.numel() * t.itemsize for t in self._sparse().state_dict().values())
        return {"bytes": path.stat().st_size, "of dense": path.stat().st_size / dense}

    def folder(self) -> Note:
        if self.name.startswith("timm"):
            return {"status": "does not apply"}
        sw.save(self._sparse(), self.work / "folder")
        found = sw.from_pretrained(self.work / "folder")
        require(type(found) is type(self.sparse), f"read as a {type(found).__name__}")
        self._reread(found)
        return {}

    def slim(self) -> Note:
        try:
            return self._slim({})
        except SparseworksError as error:
            if not hasattr(self.family.make(), "config"):
                raise
            reason = str(error)
        return {**self._slim({"uniform": False}), "uniform": reason}

    def _slim(self, options: Note) -> Note:
        model, zeroed = self.family.make(), []

        def seen(model: nn.Module, example: Any, coupling: Any, keep: Any) -> None:
            twin = copy.deepcopy(model)
            zero(twin, coupling, keep)
            zeroed.append(twin)
            check(model, example, coupling, keep)

        with patch("sparseworks.weights.structured.applying.check", seen):
            done = sw.slim(model, self.example, flops=SHARE, copy=True, **options)
        require(len(zeroed) == 1, "not checked against the zeroed model")
        worst = 0.0
        for given in (self.example, self.other):
            wanted, found = outputs(zeroed[0], given), outputs(done.model, given)
            alike = [(a, b) for a, b in zip(wanted, found, strict=True) if a.shape == b.shape]
            require(bool(alike), "all outputs have other shapes")
            worst = max(worst, *(difference([a], [b]) for a, b in alike))
        require(worst <= SLIM_TOLERANCE, f"differs from the zeroed model by {worst:.1e}")
        counts = [sum(p.numel() for p in m.parameters()) for m in (model, done.model)]
        flops = [counted(m, self.example) for m in (model, done.model)]
        require(counts[1] < counts[0] and flops[1] < flops[0], "neither smaller nor faster")
        save_slim(done, self.work / "slim")
        again = load_slim(self.work / "slim", self.family.make(seed=1))
        wanted = outputs(done.model, self.example)
        same_bits("the slimmed model from disk", wanted, outputs(again, self.example))
        return {"difference": worst, "parameters": counts[1] / counts[0],
                "operations": flops[1] / flops[0]}  # fmt: skip

    def compile(self) -> Note:
        model = self._sparse()
        if getattr(getattr(model, "config", None), "use_cache", False):
            model.config.use_cache = False  # as compiled models are
        fast = sw.compile(model, self.example)
        note: Note = {"kind": fast.kind, "difference": self._compared(model, fast)}
        missing = [n for n in fast.notes if n.startswith("no program")]
        if missing:
            note["no program"] = missing[0]
        elif fast.kind != "program":
            plan = make_plan(capture(model, (), self.example), torch.get_num_threads())
            require(plan is not None, "no plan, and no reason")
            note["program"] = self._compared(model, plan)
        return note

    def _compared(self, model: nn.Module, run: Callable[..., Any]) -> float:
        worst = 0.0
        for given in (self.example, self.other):
            wanted, found = outputs(model, given), tensors_of(run(**given))
            require(len(wanted) == len(found), "another number of outputs")
            worst = max(worst, difference(wanted, found))
        require(worst <= PROGRAM_TOLERANCE, f"differs from the model by {worst:.1e}")
        return worst


def grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of the products of a mixture, which torch's counter does not know."""
    return 2 * int(torch.Size(out_shape).numel()) * int(a[-1])


def counted(model: nn.Module, given: dict[str, Tensor]) -> int:
    """Operations by torch's own counter, which fails on views of what needs gradients."""
    banks = {torch.ops.aten._grouped_mm: grouped}
    model = copy.deepcopy(model).requires_grad_(False)
    with FlopCounterMode(display=False, custom_mapping=banks) as counter, torch.no_grad():
        model(**given)
    return int(counter.get_total_flops())
