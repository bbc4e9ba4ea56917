"""Masks for every step of one sampling chain, found without training (the second variant of
MaskUNet, Wang et al. 2025, Not All Parameters Matter: Masking Diffusion Models for Enhancing
Generation Ability). In step i of the chain, x being where it is, all logits L of a sample start at
1; some times

    m    = [sigmoid(L + g) > 1/2],  g ~ Gumbel(0, 1)       straight-through, drawn anew
    e    = denoiser(x, t_i; W * m),   x_0 = (x - sqrt(1 - a) e) / sqrt(a)
    L   <- AdamW(L, d relu(target - reward(x_0)) / dL)

then the chain goes on with the e of the last m. W rests. Samples do not meet: each has logits of
its own.

Read beside the paper: training-free/ of gudaochangsheng/MaskUnet (AdamW at 1e-2, logits 1, target
2 on ImageReward, plus five times a preference loss; one update in the first steps, ten later). It
puts logits back after each step but keeps the optimizer's moments; here both start anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.random import generator_for
from sparseworks.models.modes import evaluating
from sparseworks.weights.dynamic.sample_masks import gumbel, straight_through

__all__ = ["Searched", "search_masks"]


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Args:
        images: the end of every chain.
        masks: of each step, name -> bool `[batch, out, in]`.
    """

    images: Tensor
    masks: tuple[Mapping[str, Tensor], ...]

    def record(self, step: int, sample: int) -> Masks:
        """The masks of one sample in one step, for `sw.save_masks` or `Masks.apply`."""
        chosen = {name: mask[sample] for name, mask in self.masks[step].items()}
        return Masks.of(chosen, "maskunet", "unstructured")


def search_masks(
    model: nn.Module,
    noise: Tensor,
    condition: Tensor,
    reward: Callable[[Tensor], Tensor],
    sampler: Any,
    names: list[str],
    *,
    iterations: tuple[int, int] = (1, 10),
    few: int = 6,
    target: float = 2.0,
    lr: float = 1e-2,
    seed: int = 0,
) -> Searched:
    """Sample with masks that raise a reward; the model stays as it is.

    Args:
        model: called as (x, t, condition), the first axis of each being the samples.
        noise: where the chains start, `[batch, ...]`.
        condition: `[batch, ...]`.
        reward: images -> a number each, differentiable; more is better.
        sampler: with `steps`, `predict`, `clean` and `advance`, as the zoo's `DDIM`.
        names: of the weights that get masks.
        iterations: updates of the logits in the first `few` steps, and in those after.
        target: of the reward, above which nothing is asked for.

    Raises:
        InvalidArgument: a name that is no matrix of the model, or a number out of range.
    """
    known = dict(model.named_parameters())
    wrong = [n for n in names if n not in known or known[n].ndim != 2]
    if wrong or not names:
        raise InvalidArgument(f"search_masks: names={wrong}: no matrices of the model")
    if min(iterations) < 1 or not lr > 0 or few < 0:
        raise InvalidArgument(f"search_masks: iterations={iterations}, lr={lr} must be positive")
    weights = {n: known[n].detach() for n in names}
    x, found = noise, []

    def masked(masks: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        def one(own: Mapping[str, Tensor], x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            used = {n: weights[n] * own[n].to(weights[n].dtype) for n in names}
            out: Tensor = functional_call(model, used, (x[None], t[None], c[None]))
            return out[0]

        return lambda x, t, c: torch.vmap(one)(masks, x, t, c)

    with evaluating(model):
        for i in range(sampler.steps):
            start = {n: torch.ones(len(x), *weights[n].shape, device=x.device) for n in names}
            logits = {n: t.requires_grad_() for n, t in start.items()}
            optimizer = torch.optim.AdamW(list(logits.values()), lr)
            for k in range(iterations[0] if i < few else iterations[1]):
                hard, soft = {}, {}
                for n, logit in logits.items():
                    stream = generator_for(seed, f"{n}/{k}", i)
                    noisy = logit + gumbel(logit.shape, stream).to(logit.device)
                    hard[n] = noisy.detach() > 0
                    soft[n] = straight_through(hard[n], noisy, 1.0)
                e = sampler.predict(masked(soft), x, i, condition)
                loss = F.relu(target - reward(sampler.clean(x, e, i))).sum()
                grads = torch.autograd.grad(loss, list(logits.values()))
                for logit, grad in zip(logits.values(), grads):
                    logit.grad = grad
                optimizer.step()
            x = sampler.advance(x, e.detach(), i)
            found.append(hard)
    return Searched(x, tuple(found))
