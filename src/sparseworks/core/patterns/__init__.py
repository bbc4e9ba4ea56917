"""Patterns: which zeros are legal inside one tensor, and who competes with whom.

A pattern works on the 2-D view `[out, in]` of a parameter (see `sparseworks.models.views`). Its
heart is `select(scores, keep) -> bool mask`: pure, deterministic, exactly `keep` units.

A *unit* is what a pattern moves: one weight, one block, one row. The score of a unit is the sum of
the scores of its weights, so methods only score weights.
"""

from sparseworks.core.patterns.base import (
    Pattern,
    check_sparsity,
    count_dropped,
    resolve_sparsity,
)
from sparseworks.core.patterns.groups import Block, Group, IndexGroups
from sparseworks.core.patterns.parsing import parse_pattern
from sparseworks.core.patterns.shared import SharedInputs
from sparseworks.core.patterns.weights import NM, Banded, Unstructured

__all__ = [
    "NM",
    "Banded",
    "Block",
    "Group",
    "IndexGroups",
    "Pattern",
    "SharedInputs",
    "Unstructured",
    "check_sparsity",
    "count_dropped",
    "parse_pattern",
    "resolve_sparsity",
]
