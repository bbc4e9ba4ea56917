"""What a method that only measures is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from sparseworks.core.registry import MethodInfo

__all__ = ["Measurement"]


class Measurement(ABC):
    """Base of methods that measure models or records; frozen dataclasses of options.

    A call changes nothing that it is given.
    """

    info: ClassVar[MethodInfo]

    @abstractmethod
    def __call__(self, *subject: Any, **options: Any) -> Any:
        """Measure."""
