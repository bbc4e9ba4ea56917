"""`sparseworks.compile`: a sparse model becomes a callable that skips its zeros."""

from sparseworks.engine.compiled import Compiled, load_compiled
from sparseworks.engine.compiling import compile
from sparseworks.engine.decoder.compiling import compile_decoder
from sparseworks.engine.decoder.loading import load_decoder
from sparseworks.engine.layers import LayerPlan

__all__ = ["Compiled", "LayerPlan", "compile", "compile_decoder", "load_compiled", "load_decoder"]
