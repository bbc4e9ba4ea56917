"""Whether the weights that a model was compiled from are still what they were."""

from __future__ import annotations

import time
import warnings
import weakref
from typing import Any

from torch import Tensor, nn

__all__ = ["Origin"]

_FEW = 4  # tensors that are looked at in every call
_EVERY = 0.05  # seconds after which all are


class Origin:
    """The parameters and persistent buffers of a model, without keeping it alive.

    A tensor has changed when it was written to (torch counts that in its `_version`), or when its
    module holds another one under its name. A model that is gone has not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = type(model).__name__
        self.held: list[_Held] = []
        for prefix, module in model.named_modules():
            passing = module._non_persistent_buffers_set
            for table in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, table).items():
                    if isinstance(tensor, Tensor) and name not in passing:
                        self.held.append(_Held(module, prefix, table, name, tensor))
        few = self.held if len(self.held) <= _FEW else []
        self.few = [(h.tensor, h.version) for h in few]
        self.due = 0.0

    def check(self) -> None:
        """Warn once where a weight has changed; of many, look now and then."""
        for tensor, version in self.few:
            found = tensor()
            if found is None or found._version != version:
                self._look()
                return
        if self.held and time.perf_counter() >= self.due:
            self._look()

    def _look(self) -> None:
        self.due = time.perf_counter() + _EVERY
        changed = next((h for h in self.held if h.changed()), None)
        if changed is not None or not any(h.module() for h in self.held):
            self.held, self.few = [], []
        if changed is not None:
            warnings.warn(
                f"{changed.name} of the {self.model} has changed since it was compiled, and what "
                "was compiled has not: compile the model again",
                stacklevel=6,
            )

    def __deepcopy__(self, memo: Any) -> Origin:
        return self  # a copy was made from the same weights

    def __reduce__(self) -> Any:
        return Origin, (nn.Module(),)  # another process has other weights


class _Held:
    """One tensor of a model."""

    def __init__(
        self, module: nn.Module, prefix: str, table: str, name: str, tensor: Tensor
    ) -> None:
        self.module, self.tensor = weakref.ref(module), weakref.ref(tensor)
        self.table, self.key, self.version = table, name, tensor._version
        self.name = f"{prefix}.{name}" if prefix else name

    def changed(self) -> bool:
        module = self.module()
        if module is None:
            return False
        now: Tensor | None = getattr(module, self.table).get(self.key)
        return now is None or now is not self.tensor() or now._version != self.version
