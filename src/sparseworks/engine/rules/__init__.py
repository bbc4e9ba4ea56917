"""One rule per operator of torch, by what they work on."""

from sparseworks.engine.rules import images, pointwise, tokens, views

__all__ = ["images", "pointwise", "tokens", "views"]
