"""Private random numbers: a generator per (seed, name, step), so that nothing depends on order."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator_for"]


def generator_for(seed: int, name: str, step: int = 0) -> torch.Generator:
    """A CPU generator whose stream is a function of its key alone.

    torch's CPU generator uses 32 bits of its seed, so the key is hashed rather than shifted.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
