"""The engine room of everything trained: masks beside any loop, models changed for it."""

from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.sparsify import sparsify
from sparseworks.training.transforming import Transform, Transformed, transform

__all__ = ["Hooked", "Run", "Transform", "Transformed", "sparsify", "transform"]
