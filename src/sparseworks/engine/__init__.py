"""`sparseworks.compile`: a sparse model becomes a callable that skips its zeros."""

from sparseworks.engine.compiling import Compiled, compile
from sparseworks.engine.decoder.compiling import compile_decoder
from sparseworks.engine.decoder.loading import load_decoder
from sparseworks.engine.layers import LayerPlan
from sparseworks.engine.saving import load_compiled

__all__ = ["Compiled", "LayerPlan", "compile", "compile_decoder", "load_compiled", "load_decoder"]
