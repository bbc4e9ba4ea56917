"""The compiled module, where it could be built."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from sparseworks.core.errors import InvalidArgument

__all__ = ["available", "has_amx", "instruction_set", "module"]


@cache
def module() -> ModuleType | None:
    """The native module, or None when this installation has none."""
    try:
        return importlib.import_module("sparseworks.kernels._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether native kernels are there; otherwise the torch reference serves."""
    return module() is not None


def instruction_set() -> str:
    """The one in use: "avx512", "avx2", "base", or "none" without native kernels.

    The environment variable SPARSEWORKS_ISA forces a lower one; "avx512f" and "avx512vbmi2" take
    AVX-512 without its later extensions.

    Raises:
        InvalidArgument: the forced one is unknown or not on this processor.
    """
    native = module()
    if native is None:
        return "none"
    try:
        name: str = native.instruction_set()
    except RuntimeError as error:
        raise InvalidArgument(str(error)) from None
    return name


def has_amx() -> bool:
    """Whether the processor has AMX tiles for bf16 and the system lets this process use them."""
    native = module()
    return native is not None and bool(native.has_amx())
