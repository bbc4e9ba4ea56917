"""`sparseworks.compile`: a sparse model becomes a callable that skips its zeros."""

from sparseworks.engine.compiling import Compiled, LayerPlan, compile

__all__ = ["Compiled", "LayerPlan", "compile"]
