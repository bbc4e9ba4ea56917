"""`sparseworks.compile`: a sparse model becomes a callable that skips its zeros."""

from sparseworks.engine.compiled import Compiled, load_compiled
from sparseworks.engine.compiling import compile
from sparseworks.engine.decoding import Decoder, compile_decoder
from sparseworks.engine.layers import LayerPlan

__all__ = ["Compiled", "Decoder", "LayerPlan", "compile", "compile_decoder", "load_compiled"]
