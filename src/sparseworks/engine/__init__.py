"""`sparseworks.compile`: a sparse model becomes a callable that skips its zeros."""

from sparseworks.engine.compiled import Compiled
from sparseworks.engine.compiling import compile
from sparseworks.engine.decoding import Decoder, compile_decoder
from sparseworks.engine.layers import LayerPlan
from sparseworks.engine.saving import load_compiled

__all__ = ["Compiled", "Decoder", "LayerPlan", "compile", "compile_decoder", "load_compiled"]
