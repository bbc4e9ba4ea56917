"""What `sparseworks.compile` makes: a callable that explains itself, is saved, and loaded again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.engine.explaining import layer_lines, program_lines
from sparseworks.engine.layers import LayerPlan
from sparseworks.engine.part import check_shape
from sparseworks.engine.plan import Plan
from sparseworks.engine.saving import read_plan, save_plan
from sparseworks.kernels.native import instruction_set

__all__ = ["Compiled", "load_compiled"]


class Compiled:
    """A compiled model: call it as the model it was made from.

    A call takes `out=` where the model returns one tensor: contiguous fp32 memory of the caller for
    the result, which saves the last allocation.

    Attributes:
        kind: "program", "layers" or "torch".
        error: largest difference from the model on the example, max |y - y'| / max |y|.
        times: milliseconds of each way that was measured on the example.
        notes: why a way was not taken.
        layers: what was chosen for each linear layer, of kind "layers".
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kind: str,
        error: float = 0.0,
        times: dict[str, float] | None = None,
        notes: list[str] | None = None,
        layers: tuple[LayerPlan, ...] = (),
    ) -> None:
        self.run, self.kind, self.error = run, kind, error
        self.times, self.notes, self.layers = times or {}, notes or [], layers

    @property
    def plan(self) -> Plan | None:
        """The steps, of kind "program"."""
        return self.run if isinstance(self.run, Plan) else None

    def __call__(self, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        if isinstance(self.run, Plan):
            return self.run(*args, out=out, **kwargs)
        with torch.no_grad():
            made = self.run(*args, **kwargs)
            if out is None:
                return made
            if not isinstance(made, Tensor):
                raise InvalidArgument(
                    f"out= is for models that return one tensor, not {type(made).__name__}"
                )
            check_shape(out, made.shape)
            return out.copy_(made)

    def explain(self) -> str:
        """What runs: a line per layer with its kernel, sparsity and time, and what dense takes."""
        lines = [f"runs as {self.kind} on {instruction_set()}, {torch.get_num_threads()} threads"]
        lines += [f"  {way}: {ms:.3f} ms on the example" for way, ms in self.times.items()]
        lines += [f"  {note}" for note in self.notes]
        if self.plan is not None:
            lines += program_lines(self.plan)
        elif self.layers:
            lines += layer_lines(self.layers)
        lines.append(f"relative error on the example {self.error:.1e}")
        return "\n".join(lines)

    def save(self, path: Any) -> None:
        """Write the plan, to be loaded by `sparseworks.load_compiled`.

        Raises:
            InvalidArgument: not of kind "program".
            CheckpointError: the file cannot be written.
        """
        if self.plan is None:
            raise InvalidArgument(
                f"this model runs as {self.kind}, which has no plan of its own: save the model"
            )
        save_plan(self.plan, path, self.error, self.times)


def load_compiled(path: str | os.PathLike[str], *, threads: int | None = None) -> Compiled:
    """Load what `Compiled.save` wrote; nothing is measured or traced again.

    Args:
        path: of the file.
        threads: of the native kernels; None: as many as torch uses.

    Raises:
        CheckpointError: not a plan, of another version, or no native kernels to run it.
    """
    plan, error, times = read_plan(path, threads)
    return Compiled(plan, "program", error, times)
