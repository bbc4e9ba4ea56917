"""Models of timm and torchvision by name, without a network.

    model = sw.zoo.from_library("timm:convnext_atto", num_classes=10)
    sw.load("convnext.safetensors", model)

Their weights are random. Pretrained ones lie on servers and, of torchvision, in pickles: what was
fetched before is loaded as any other file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, MissingDependency

__all__ = ["LIBRARIES", "from_library", "input_shape"]

LIBRARIES = ("timm", "torchvision")


def from_library(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """A model of timm or torchvision with random weights, in evaluation mode.

    Args:
        name: "timm:NAME" or "torchvision:NAME".
        seed: of the weights; torch's own generator stays as it was.
        options: what the library takes for this model: num_classes=10, in_chans=1 (timm), ...

    Raises:
        InvalidArgument: no such model, an option that it does not take, or pretrained weights.
        MissingDependency: the library is not installed.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise InvalidArgument(f"{name!r}: use timm:NAME or torchvision:NAME")
    for option in ("pretrained", "weights"):
        if options.get(option):
            raise InvalidArgument(
                f"{name}: {option}={options[option]!r}: pretrained weights need a network; fetch "
                "them yourself as safetensors and load that file (sw.load, or on the command line "
                f"{name}:weights=FILE.safetensors)"
            )
    build = _of_timm if library == "timm" else _of_torchvision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: nn.Module = build(model, options)
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise InvalidArgument(f"{name} with {options}: {error}") from None
    return made.eval()


def input_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    """The shape of one image that the model was made for; () where its library does not tell.

    Args:
        name: as `from_library` takes it.
        model: that it made.
    """
    library, _, known = name.partition(":")
    if library == "timm":
        config: Any = getattr(model, "default_cfg", None) or {}
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        size = config.get("input_size", ())
        return (channels, *size[1:]) if size else ()
    from torchvision import models

    try:
        preset: Any = models.get_model_weights(known).DEFAULT.transforms()
    except (AttributeError, ValueError):
        return ()
    crop = getattr(preset, "crop_size", None)
    return (3, crop[0], crop[0]) if crop else ()


def _of_timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingDependency(f"timm:{name} needs timm: pip install timm") from None
    _check_name(name, timm.list_models(), "timm", name.partition(".")[0])
    made: nn.Module = timm.create_model(name, pretrained=False, **options)
    return made


def _of_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise MissingDependency(
            f"torchvision:{name} needs torchvision: pip install torchvision"
        ) from None
    _check_name(name, models.list_models(), "torchvision", name)
    builder = models.get_model_builder(name)
    # detectors would fetch a backbone
    own = {"weights_backbone": None} if "weights_backbone" in signature(builder).parameters else {}
    made: nn.Module = builder(weights=None, **{**own, **options})
    return made


def _check_name(name: str, known: Iterable[str], library: str, plain: str) -> None:
    known = list(known)
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InvalidArgument(f"{library} has no model {name!r}{hint}")
