"""One rule per operator of torch, by what they work on."""

from sparseworks.engine.rules import (
    attention,
    images,
    pointwise,
    resampling,
    scores,
    spelt_attention,
    tokens,
    views,
)

__all__ = ["attention", "images", "pointwise", "resampling", "scores", "spelt_attention", "tokens",
           "views"]  # fmt: skip
