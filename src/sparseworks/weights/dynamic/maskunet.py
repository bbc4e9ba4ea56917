"""MaskUNet (Wang et al. 2025, Not All Parameters Matter: Masking Diffusion Models for Enhancing
Generation Ability): binary masks over the weights of a frozen denoiser, made anew for every sample
and time. For one linear layer W `[out, in]` of a block of the decoder, with x the inputs of the
block (what comes from below and what was skipped) and e the embedding of the time,

    h    = GAP(x) + A e                                   context of a sample, one value a channel
    M    = relu(V relu(U h + u) + v)                      `[out / f, in / f]`, one a block
    L_oi = sum_q C_iq (sum_p R_op M_pq + b_o) + c_i       logits `[out, in]`, R, b, C, c a layer's
    m    = [sigmoid((L + g) / tau) > 1/2]                 g ~ Gumbel(0, 1) in training, 0 after it
    y    = (W * m) x + bias                               W rests, every sample has its own m

and in the backward pass dm/dL is that of the sigmoid (straight-through). R = C = 0 and c = 5 at
first: all weights are kept. The loss is that of the denoiser; U, u, V, v, A, R, b, C, c train.

Read beside the paper: training/hyperunet.py of gudaochangsheng/MaskUnet. Found there: V = 0 and
v = 0 under the outer relu, whose derivative at 0 is 0, so that M stays 0 and the masks depend on
neither sample nor time; here v = 1 at first (`offset`), which changes no first mask since R = C =
0. The noise g is drawn at inference too; here it is not. Every masked layer is computed twice,
first without its mask.

Ours: `sparsity` (or N:M) keeps that many of the largest L of each layer instead of those above 0;
`finish` folds the masks of the mean M of the training, `merged` those of a given call;
`masks_of` gives the latter as a record for `sw.save_masks`, a bit a weight. The variant without
training is `mask_search`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks, attach
from sparseworks.core.patterns import Unstructured
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.hooks import duplicate
from sparseworks.models.modes import evaluating
from sparseworks.models.views import View
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.sample_masks import Block, Generator, MaskedLinear, context

__all__ = ["MaskUNet", "layers_of", "masks_of", "merged", "unmasked"]


@dataclass(frozen=True, kw_only=True)
class MaskUNet(Transform):
    """Learn masks for every sample and time over the frozen linear layers of a decoder.

    Args:
        blocks: name pattern of the blocks that have a generator each; None: `up_blocks.*`, or
            where there are none the whole model.
        example: what the model is called with, as a tuple; its blocks' inputs say how wide a
            generator is and whether it sees a time. It may be left out for the whole model.
        skip: words; a linear layer whose name in its block holds one of them is left alone.
        factor: f.
        hidden: width inside a generator.
        bias: b and c at first; the derivative of the masks falls with it (0.007 at 5).
        offset: v at first.
        tau: temperature.
    """

    blocks: str | None = None
    example: Any = field(default=None, repr=False, compare=False)
    skip: str = "time ff shortcut proj_in proj_out"
    factor: int = 4
    hidden: int = 64
    bias: float = 5.0
    offset: float = 1.0
    tau: float = 1.0

    needs_sparsity = False
    info: ClassVar[MethodInfo] = MethodInfo(
        name="maskunet",
        title="Not All Parameters Matter: Masking Diffusion Models for Enhancing Generation "
        "Ability",
        authors="Wang et al.",
        year=2025,
        card="156",
        room="weights",
        kind="transform",
        needs=("training",),
        pattern="unstructured (any), of its own for every sample",
        budget="none: a threshold; or the share that is asked for",
        cost="masks of batch x weight numbers in every pass; a small generator a block",
        summary="masks of a frozen denoiser that depend on sample and time",
    )

    def __post_init__(self) -> None:
        if self.factor < 1 or self.hidden < 1 or not self.tau > 0 or self.offset < 0:
            raise InvalidArgument(
                f"maskunet: factor={self.factor} and hidden={self.hidden} must be at least 1, "
                f"tau={self.tau} positive, offset={self.offset} at least 0"
            )

    def begin(self, job: Transformed) -> None:
        blocks = self._blocks(job)
        inputs = self._inputs(job.model, blocks)
        threshold = job.sparsity is None and job.pattern == Unstructured()
        taken: dict[str, View] = {}
        hooks: list[tuple[nn.Module, Block]] = []
        for block, views in blocks.items():
            channels, time = inputs[block]
            shape = views[0].shape[0] // self.factor, channels // self.factor
            shape = max(1, shape[0]), max(1, shape[1])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator_for(job.seed, f"maskunet/{block}").initial_seed())
                generator = Generator(channels, time, shape, self.hidden, self.offset)
            shared = Block(generator.to(views[0].parameter.device))
            hooks.append((job.model.get_submodule(block), shared))
            for view in views:
                plain = view.module
                assert isinstance(plain, nn.Linear)
                pattern = None if threshold else view.fitted(job.pattern)
                keep = 0 if pattern is None else pattern.keep(view.shape, job.sparsity or 0.0)
                layer = MaskedLinear(
                    plain, view.name, shared, view is views[0], pattern, keep, self.bias, self.tau,
                    job.seed,
                )  # fmt: skip
                job.replace(view.module_name, layer.train(plain.training))
                taken[view.name] = View(view.name, layer, "weight", "linear")
        added = {id(p) for m in job.model.modules() if isinstance(m, MaskedLinear)
                 for n, p in m.named_parameters() if n not in ("weight", "bias")}  # fmt: skip
        for module in job.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in added:
                    job.freeze(module, name)
        for name in job.views.keys() - taken.keys():
            job.skipped[name] = "not a linear layer of a block with masks"
        job.views = taken
        handles: list[Any] = []
        try:
            for module, shared in hooks:
                handles.append(module.register_forward_pre_hook(shared, with_kwargs=True))
        except BaseException:
            for handle in handles:
                handle.remove()
            raise

    def _blocks(self, job: Transformed) -> dict[str, list[View]]:
        """Block -> the views of its layers that get masks, in the order of the model."""
        names = [n for n, _ in job.model.named_modules()]
        asked = "up_blocks.*" if self.blocks is None else self.blocks
        found = [n for n in names if fnmatchcase(n, asked) and n.count(".") == asked.count(".")]
        if not found and self.blocks is not None:
            raise InvalidArgument(f"maskunet: no module has a name like blocks={asked!r}")
        skipped = self.skip.split()
        taken: dict[str, list[View]] = {}
        for block in found or [""]:
            start = f"{block}." if block else ""
            views = [
                v for v in job.views.values()
                if v.name.startswith(start) and type(v.module) is nn.Linear
                and not any(word in v.module_name[len(start):] for word in skipped)
            ]  # fmt: skip
            if views:
                taken[block] = views
        if not taken:
            raise InvalidArgument(
                f"maskunet: no linear layer in {', '.join(found) or 'the model'} to mask; name "
                "others with blocks= or skip="
            )
        return taken

    def _inputs(self, model: nn.Module, blocks: Any) -> dict[str, tuple[int, int]]:
        """Channels of each block's inputs, and the width of its time or 0."""
        if self.example is not None:
            return _widths(model, blocks, self.example)
        first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
        if list(blocks) != [""] or first is None:
            raise InvalidArgument(
                "maskunet: give example=, what the model is called with: it says how wide the "
                f"inputs of {', '.join(blocks)} are, and whether they come with a time"
            )
        return {"": (first.in_channels if isinstance(first, nn.Conv2d) else first.in_features, 0)}

    def counted(self, job: Transformed) -> tuple[int, int]:
        masks = [layer.typical() for layer in layers_of(job.model).values()]
        return sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)

    def finish(self, job: Transformed) -> None:
        for name, layer in layers_of(job.model).items():
            job.set_mask(name, layer.typical())
        for name, module in unmasked(job.model).items():
            job.views[name] = View(name, module, "weight", "linear")


def layers_of(model: nn.Module) -> dict[str, MaskedLinear]:
    """The masked layers of a model, by the names of their weights."""
    return {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}


def unmasked(model: nn.Module) -> dict[str, nn.Linear]:
    """Put ordinary layers in the places of masked ones, by the names of their weights."""
    made = {}
    for name, layer in layers_of(model).items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        made[name] = layer.plain()
        setattr(model.get_submodule(parent), child, made[name])
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Block):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return made


@torch.no_grad()
def masks_of(model: nn.Module, *inputs: Any, **named: Any) -> Masks:
    """The masks that a call with one sample computes with, in evaluation mode.

    Raises:
        ModelError: the model has no masked layers, or the call is not of one sample.
    """
    layers = layers_of(model)
    with evaluating(model):
        model(*inputs, **named)
    found = {n: layer.last for n, layer in layers.items()}
    masks = {n: m[0] for n, m in found.items() if m is not None and len(m) == 1}
    if not layers or len(masks) < len(layers):
        raise ModelError("maskunet: masks are those of one sample, of a model with masked layers")
    return Masks.of(masks, "maskunet", "unstructured")


@torch.no_grad()
def merged(model: nn.Module, *inputs: Any, **named: Any) -> nn.Module:
    """An ordinary copy of a model that has the masks of this call for every call, zeros exact."""
    record = masks_of(model, *inputs, **named)
    plain = duplicate(model)
    for name, layer in unmasked(plain).items():
        layer.weight.copy_(layer.weight.masked_fill(~record[name].to(layer.weight.device), 0.0))
    attach(plain, record)
    return plain


@torch.no_grad()
def _widths(model: nn.Module, blocks: Any, example: Any) -> dict[str, tuple[int, int]]:
    """What each block is called with, in a forward pass."""
    found: dict[str, tuple[int, int]] = {}
    handles = []
    for name in blocks:

        def look(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            h, time = context(args, kwargs)
            found[name] = h.shape[1], 0 if time is None else time.shape[1]

        hook = model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
        handles.append(hook)
    try:
        with evaluating(model):
            model(*(example if isinstance(example, (tuple, list)) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [n for n in blocks if n not in found]:
        raise ModelError(f"maskunet: the example's pass does not call {missing[0]}")
    return found
