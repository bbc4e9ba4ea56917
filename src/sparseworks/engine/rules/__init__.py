"""One rule per operator of torch, by what they work on."""

from sparseworks.engine.rules import images, pointwise, tokens

__all__ = ["images", "pointwise", "tokens"]
