"""Parameters go by the names of the model itself, whatever wrappers are put round it."""

from __future__ import annotations

from torch import nn

__all__ = ["plain_name", "unwrapped"]

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, torch.compile and FSDP."""
    for prefix in _WRAPPERS:
        name = name.replace(prefix, "", 1) if name.startswith(prefix) else name
    return name.replace("._orig_mod.", ".").replace("._fsdp_wrapped_module.", ".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, AveragedModel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner
