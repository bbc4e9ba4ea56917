"""The engine room of everything trained: mask hooks that live beside any training loop."""

from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.sparsify import sparsify

__all__ = ["Hooked", "Run", "sparsify"]
