"""What kind of sparsity a method makes, in the words of the field, for machines to compare.

The axes are those of Liu & Wang 2023, Ten Lessons We Have Learned in the New "Sparseland": when the
weights go, on which path, how long a mask lives. They decide what a comparison must count: a method
that starts dense pays for dense training and dense memory, one that starts sparse does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument

__all__ = ["Taxonomy", "taxonomy"]

When = Literal["never", "before training", "during training", "after training", "unknown"]
Path = Literal["dense", "dense to sparse", "sparse to sparse", "unknown"]
Life = Literal["none", "static", "shrinking", "moving", "unknown"]


@dataclass(frozen=True)
class Taxonomy:
    """Where a method stands.

    Args:
        when: the zeros are chosen.
        path: of the density while the weights train; sparse to sparse never holds the dense model.
        masks: static, shrinking (never grow), or moving (drop and grow).
        goal: what becomes cheaper.
        needs: what the caller must give: data, loss, labels, training.
        pattern: default pattern.
    """

    when: When
    path: Path
    masks: Life
    goal: str
    needs: tuple[str, ...] = ()
    pattern: str = "any"


_BEFORE = {"snip", "grasp", "synflow"}
_TRAINED: dict[str, tuple[When, Path, Life]] = {
    "static": ("before training", "sparse to sparse", "static"),
    "set": ("during training", "sparse to sparse", "moving"),
    "rigl": ("during training", "sparse to sparse", "moving"),
    "sparse-ift": ("during training", "sparse to sparse", "moving"),
    "gradual": ("during training", "dense to sparse", "shrinking"),
    "granet": ("during training", "dense to sparse", "moving"),
    "sr-ste": ("during training", "dense to sparse", "moving"),
    "mdgf": ("during training", "dense to sparse", "moving"),
    "sdgf": ("during training", "dense to sparse", "moving"),
    "bdwp": ("during training", "dense to sparse", "moving"),
    "ast": ("during training", "dense to sparse", "moving"),
    "slorb": ("during training", "dense to sparse", "moving"),
    "cast": ("during training", "dense to sparse", "moving"),
    "maskllm": ("after training", "dense to sparse", "moving"),
    "squarehead": ("after training", "sparse to sparse", "static"),
    "fixed": ("after training", "sparse to sparse", "static"),
    "dsl": ("during training", "dense to sparse", "moving"),
    "scl": ("during training", "dense to sparse", "moving"),
    "bip": ("during training", "dense to sparse", "moving"),
    "jackpots": ("after training", "dense to sparse", "moving"),
    "sparse-then-prune": ("after training", "dense to sparse", "static"),
    "turbo-vbi": ("during training", "dense to sparse", "moving"),
    "rewinding": ("after training", "dense to sparse", "shrinking"),
    "soup": ("after training", "dense to sparse", "shrinking"),
    "lost": ("during training", "sparse to sparse", "static"),
    "pst": ("after training", "dense to sparse", "moving"),
    "sltrain": ("during training", "sparse to sparse", "static"),
    "sst": ("during training", "dense to sparse", "static"),
    "random-search": ("before training", "sparse to sparse", "static"),
}


def taxonomy(method: str) -> Taxonomy:
    """Where a registered method stands, or "dense"; axes that nobody has noted are "unknown".

    Raises:
        InvalidArgument: no such method, or one that only measures.
    """
    if method == "dense":
        return Taxonomy("never", "dense", "none", "the reference")
    info = registry.resolve(method).info
    if info.kind in ("measurement", "optimizer"):
        does = "measures" if info.kind == "measurement" else "optimizes"
        raise InvalidArgument(f"method {method!r} {does}; it makes nothing sparse")
    when, path, life = _TRAINED.get(method, ("unknown", "unknown", "unknown"))
    if info.kind in ("one-shot", "search"):
        when = "before training" if method in _BEFORE else "after training"
        path = "sparse to sparse" if method in _BEFORE else "dense to sparse"
        life = "static"
    elif info.kind == "train-and-cut":
        when, path, life = "during training", "dense to sparse", "static"
    elif info.kind == "structured":
        when, path, life = "after training", "dense to sparse", "static"
    goal = "inference and training" if path == "sparse to sparse" else "inference"
    return Taxonomy(when, path, life, goal, info.needs, info.pattern)
