"""Similarity- and attention-aware routing (Nguyen et al. 2025, Improving Routing in Sparse Mixture
of Experts with Graph of Tokens, ICML 2025, arXiv:2505.00792): similar tokens vote on each other's
experts, so that near-identical ones are not torn apart late in training.

    r_j = softmax(W x_j),   r~_i = sum_j S_ij r_j,   top-k of r~_i, renormalised

Similarity: S = rowsoftmax(U U^T / tau), rows of U normalised, U the layer's inputs. Attention: S is
the attention of the block just before, averaged over heads. S = I is the usual router.
Probabilities are mixed, not logits; experts see their own token only. The temperature (unverified)
and the plain average over heads are our reading: the paper weighs heads by a posterior. `keep`
mixes in the identity: S = (1 - keep) S + keep I (attention alone makes r~ flat, with near ties that
flip).

In our quick setting (claim 182: a byte decoder, 240 steps) attention makes first experts change
three times as often in the second half of training, and similarity 1.3 times (0.45 and 0.20 of the
tokens in a tenth of the steps, baseline 0.15). Losses are 0.016 and 0.006 nats above the
baseline's; that of similarity rises less with a tenth of the bytes replaced, and its experts tell
at least 0.9 of what the baseline's tell of the byte.

S is causal with `causal=True`. A token's experts depend on all tokens before it, which a cache of
keys and values does not hold: `use_cache` of a Hugging Face model is turned off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.experts.layers import MoE
from sparseworks.experts.method import Job, MixtureMethod
from sparseworks.experts.mlps import Mlp
from sparseworks.experts.routers import TopK
from sparseworks.experts.routing import Routing

__all__ = ["AttentionAware", "GraphOfTokens", "SimilarityAware"]


class _Smoothed(TopK):
    """Top-k of probabilities that a matrix of tokens has mixed."""

    def __init__(self, experts: int, width: int, k: int, *, keep: float, **more: Any) -> None:
        super().__init__(experts, width, k, **more)
        self.keep = keep

    def mix(self, x: Tensor, r: Tensor, attention: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, attention: Tensor | None = None) -> Routing:
        z = self.logits(x)
        r = z.softmax(-1)
        mixed = self.mix(x, r, attention) if self.keep < 1 else r
        return self.choose(mixed + self.keep * (r - mixed) if self.keep else mixed, z)


class SimilarityAware(_Smoothed):
    """S = rowsoftmax(u_i . u_j / tau) of inputs `[..., length, d]`.

    Args:
        tau: temperature.
        normalize: rows of U have length 1.
        causal: tokens vote on later ones only.
    """

    def __init__(
        self, experts: int, width: int, k: int = 2, *, tau: float = 0.1, keep: float = 0.0,
        normalize: bool = True, causal: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(experts, width, k, keep=keep, **more)
        self.tau, self.normalize, self.causal = tau, normalize, causal

    def similarity(self, x: Tensor) -> Tensor:
        """S `[..., length, length]`."""
        u = x.to(torch.promote_types(x.dtype, torch.float32))
        u = F.normalize(u, dim=-1) if self.normalize else u
        scores = u @ u.transpose(-2, -1) / self.tau
        if self.causal:
            n = x.shape[-2]
            future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1)

    def mix(self, x: Tensor, r: Tensor, attention: Tensor | None) -> Tensor:
        return self.similarity(x) @ r


class AttentionAware(_Smoothed):
    """S is the attention of the block before, averaged over heads.

    Args:
        detach: the attention gets no gradient from here.
    """

    attends = True

    def __init__(
        self, experts: int, width: int, k: int = 2, *, keep: float = 0.0, detach: bool = True,
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(experts, width, k, keep=keep, **more)
        self.detach = detach

    def mix(self, x: Tensor, r: Tensor, attention: Tensor | None) -> Tensor:
        n = x.shape[-2]
        if attention is None or attention.shape[-2:] != (n, n):
            shape = None if attention is None else tuple(attention.shape)
            raise ModelError(
                f"attention of shape {shape} for {n} tokens; call the model with all tokens and "
                "use_cache=False"
            )
        s = attention.mean(-3).to(r.dtype)
        return (s.detach() if self.detach else s) @ r


class _Tap:
    """A hook that hands a layer the attention that its block has just computed."""

    def __init__(self, layer: MoE) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layer.attention = output[1] if isinstance(output, tuple) else None


@dataclass(frozen=True)
class GraphOfTokens(MixtureMethod):
    """A top-k router whose probabilities similar tokens, or attended ones, share.

    Args:
        top_k: experts of a token.
        by: "similarity" or "attention".
        tau: temperature of the similarity.
        keep: share of a token's own probabilities beyond S.
        normalize: of the similarity: cosines.
        causal: of the similarity.
        detach: of the attention: no gradient.
    """

    top_k: int = 2
    by: Literal["similarity", "attention"] = "similarity"
    tau: float = 0.1
    keep: float = 0.0
    normalize: bool = True
    causal: bool = True
    detach: bool = True

    info: ClassVar[MethodInfo] = MethodInfo(
        name="graph-of-tokens",
        title="Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
        authors="Nguyen et al.",
        year=2025,
        card="182",
        room="experts",
        kind="mixture",
        pattern="experts of a token",
        budget="top-k of each token",
        tensors="MLPs",
        cost="training; length^2 x experts for each layer and sequence",
        summary="similar or attended tokens share their votes for experts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise InvalidArgument(f"top_k={self.top_k} must be in 1..experts={self.experts}")
        if self.by not in ("similarity", "attention"):
            raise InvalidArgument(f"by={self.by!r}: use 'similarity' or 'attention'")
        if not self.tau > 0 or not 0 <= self.keep <= 1:
            raise InvalidArgument("tau= above 0, keep= in [0, 1]")

    def layer(self, mlp: Mlp, generator: torch.Generator) -> MoE:
        down = mlp.weights[1]
        more: dict[str, Any] = {"keep": self.keep, "generator": generator, "dtype": down.dtype,
                                "device": down.device}  # fmt: skip
        shape = self.experts, mlp.width, self.top_k
        router: TopK
        if self.by == "similarity":
            router = SimilarityAware(
                *shape, tau=self.tau, normalize=self.normalize, causal=self.causal, **more
            )
        else:
            router = AttentionAware(*shape, detach=self.detach, **more)
        return MoE(router, self.bank(mlp, generator))

    def begin(self, job: Job) -> None:
        config: Any = getattr(job.model, "config", None)
        if self.by == "attention":
            for name, layer in job.layers.items():
                block = job.model.get_submodule(name.rpartition(".")[0])
                attention = getattr(block, "self_attn", None)
                if isinstance(attention, nn.Module):
                    if getattr(config, "_attn_implementation", "eager") != "eager":
                        raise ModelError(
                            "by='attention' reads attention probabilities: load the model with "
                            "attn_implementation='eager'"
                        )
                    attention.register_forward_hook(_Tap(layer))
        for name in ("config", "generation_config"):
            owner: Any = getattr(job.model, name, None)
            if getattr(owner, "use_cache", False):
                owner.use_cache = False
                job.own["use_cache"] = True

    def undo(self, job: Job) -> None:
        for module in job.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Tap):
                    del module._forward_hooks[key]
        for name in ("config", "generation_config"):
            found: Any = getattr(job.model, name, None)
            if job.own.get("use_cache") and hasattr(found, "use_cache"):
                found.use_cache = True
