"""The one exception family of sparseworks.

Every message says what was wrong, where, and what to do. The command line prints it as one line.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "InvalidArgument",
    "MissingDependency",
    "ModelError",
    "PatternError",
    "SparseworksError",
]


class SparseworksError(Exception):
    """Base of every error that sparseworks raises on purpose."""


class InvalidArgument(SparseworksError, ValueError):
    """An option has a value that cannot be used."""


class PatternError(InvalidArgument):
    """A tensor cannot take a pattern (its shape does not divide, say)."""


class DataError(SparseworksError, ValueError):
    """Calibration or evaluation data is missing, empty, malformed or not finite."""


class ModelError(SparseworksError, ValueError):
    """A model cannot be treated as asked (nothing to prune, non-finite weights, ...)."""


class CheckpointError(SparseworksError, ValueError):
    """A checkpoint is truncated, tampered with, or belongs to another model."""


class MissingDependency(SparseworksError, ImportError):
    """An optional package is needed by this call; the message names the extra to install."""
