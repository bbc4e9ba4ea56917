"""A compiled model as a module of torch, which stands wherever the model stood."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.types import dense_lines
from sparseworks.engine.attributes import Attributes
from sparseworks.engine.explaining import layer_lines, program_lines
from sparseworks.engine.layers import LayerPlan
from sparseworks.engine.origin import Origin
from sparseworks.engine.outside import Outside
from sparseworks.engine.part import check_shape
from sparseworks.engine.plan import Plan
from sparseworks.engine.recent import LIMIT
from sparseworks.engine.saving import read_plan, save_plan
from sparseworks.kernels.native import instruction_set
from sparseworks.models.calls import signature_of

__all__ = ["Compiled", "Eager", "load_compiled"]


class Compiled(nn.Module):
    """A compiled model: call it as the model it was made from.

    A call takes `out=` where the model returns one tensor: contiguous fp32 memory of the caller for
    the result, which saves the last allocation.

    It shows the model's attributes, but for its weights and modules (of a config, `use_cache` is
    False), and stays as it is: for inference, on the CPU, in the dtype of the model, with the
    weights that were compiled. It has one parameter, which is empty and tells dtype and device to
    who looks at the first.

    Attributes:
        kind: "program", "layers" or "torch".
        error: largest difference from the model on the example, max |y - y'| / max |y|.
        times: milliseconds of each way that was measured on the example.
        notes: why a way was not taken.
        layers: what was chosen for each linear layer, of kind "layers".
        skipped: name -> why its zeros are not skipped, of every parameter of two or more axes that
            no kernel here runs.
        outside: share of the time that torch takes on the example, of kind "program"; None where
            it was not measured.
    """

    forward: Callable[..., Any]

    def __init__(
        self,
        run: Plan | Eager | nn.Module,
        kind: str,
        error: float = 0.0,
        times: dict[str, float] | None = None,
        notes: list[str] | None = None,
        layers: tuple[LayerPlan, ...] = (),
        shown: Attributes | None = None,
        origin: Origin | None = None,
        skipped: dict[str, str] | None = None,
        outside: Outside | None = None,
    ) -> None:
        super().__init__()
        self.training = False
        self.run = Eager(run) if isinstance(run, nn.Module) else run
        self.kind, self.error, self.layers = kind, error, layers
        self.times, self.notes = times or {}, notes or []
        self.skipped = skipped or {}
        self.outside = outside
        self.shown = Attributes() if shown is None else shown
        self.run.origin = origin
        self.forward = self.run
        empty = torch.empty(0, dtype=self.shown.dtype)
        self.register_parameter("_empty", nn.Parameter(empty, requires_grad=False))

    @property
    def plan(self) -> Plan | None:
        """The steps, of kind "program"."""
        return self.run if isinstance(self.run, Plan) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.shown.dtype

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def __signature__(self) -> Any:
        return self.forward.__signature__  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            shown = self.__dict__.get("shown")
            if shown is None or name.startswith("__"):
                raise
        return shown.get(self, name)

    def train(self, mode: bool = True) -> Compiled:
        """Does nothing for False.

        Raises:
            ModelError: for True.
        """
        if mode:
            raise ModelError(
                f"the compiled {self.shown.name} has no weights to train: train the model it was "
                "made from and compile it again; beside it, train the other modules by themselves"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Compiled:
        """What `to`, `cuda`, `half` and the like come to; nothing is ever changed."""
        reason = (
            f"the compiled {self.shown.name} stays on the CPU in {self.dtype}: move or convert the "
            "model it was made from; `compile` has dtype= for products in bf16 and int8"
        )
        try:
            found = fn(torch.empty(0, dtype=self.dtype))
        except Exception as error:  # a device that is not here, say
            raise ModelError(reason) from error
        if found.device.type != "cpu" or found.dtype != self.dtype:
            raise ModelError(reason)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, as a part of another module.

        Raises:
            ModelError: by itself, so that no file is written without weights.
        """
        if not args and kwargs.get("destination") is None:
            raise ModelError(
                f"the compiled {self.shown.name} has no state of its own: `save` writes its plan"
            )
        return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = next((k for k in state_dict if k.startswith(prefix)), None)
        if name is not None:
            raise ModelError(
                f"{name}: the compiled {self.shown.name} takes no weights: load them into the "
                "model it was made from and compile it again"
            )

    def extra_repr(self) -> str:
        return f"{self.shown.name}, {self.kind}"

    def explain(self) -> str:
        """What runs: a line per layer with its kernel, sparsity and time, and what dense takes.

        The last line says what torch runs between programs, and what share of the time it takes.
        """
        lines = [f"runs as {self.kind} on {instruction_set()}, {torch.get_num_threads()} threads"]
        lines += [f"  {way}: {ms:.3f} ms on the example" for way, ms in self.times.items()]
        lines += [f"  {note}" for note in self.notes]
        if self.plan is not None:
            lines += program_lines(self.plan)
        elif self.layers:
            lines += layer_lines(self.layers)
        lines += dense_lines(self.skipped)
        lines.append(f"relative error on the example {self.error:.1e}")
        if self.outside is not None:
            lines.append(self.outside.line())
        return "\n".join(lines)

    def save(self, path: Any) -> None:
        """Write the plan, to be loaded by `sparseworks.load_compiled`.

        A model of kind "torch" or "layers" has no plan, and what torch runs is the model itself.

        Raises:
            InvalidArgument: not of kind "program"; says why it is not, and what to do.
            CheckpointError: the file cannot be written.
        """
        if self.plan is None:
            raise InvalidArgument(f"{path}: nothing was written: {self._unplanned()}")
        save_plan(self.plan, path, self.error, self.times, self.shown)

    def _unplanned(self) -> str:
        """Why there is no plan, and what to do."""
        measured = ", ".join(f"{way} {ms:.3g} ms" for way, ms in self.times.items())
        if self.kind == "layers":
            return (
                f"{self.shown.name} is fastest layer by layer ({measured}), which has no plan; "
                "save the model, and compile it again where it is loaded"
            )
        programs = [way for way in self.times if way not in ("torch", "layers")]
        why = "" if programs else f"; {'; '.join(self.notes) or 'there is no program'}"
        return (
            f"torch runs {self.shown.name} fastest ({measured}{why}), so there is no plan; run the "
            "model as it is, or compile it with more zeros or an example of the size that it will "
            "run on"
        )


class Eager:
    """A model that torch runs, without gradients.

    Args:
        model: in evaluation mode.
        bf16: run its products in bf16 where torch does so by itself.
        origin: warns where the weights that it was made from have changed.
    """

    def __init__(self, model: nn.Module, bf16: bool = False, origin: Origin | None = None) -> None:
        self.model, self.bf16, self.origin = model, bf16, origin
        self.__signature__ = signature_of(model)
        self.own_out = "out" in self.__signature__.parameters

    def __call__(self, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
        if self.origin is not None:
            self.origin.check()
        with torch.no_grad():
            return self._into(out, *args, **kwargs)

    def _into(self, out: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if self.own_out and out is not None:
            kwargs["out"], out = out, None
        made = self._made(*args, **kwargs)
        if out is None:
            return made
        if not isinstance(made, Tensor):
            raise InvalidArgument(
                f"out= is for models that return one tensor, not {type(made).__name__}"
            )
        check_shape(out, made.shape)
        return out.copy_(made)

    def _made(self, *args: Any, **kwargs: Any) -> Any:
        if not self.bf16:
            return self.model(*args, **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            made = self.model(*args, **kwargs)
        return tree_map(
            lambda t: t.float() if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t, made
        )

    def __reduce__(self) -> Any:
        return Eager, (self.model, self.bf16, self.origin)


def load_compiled(
    path: str | os.PathLike[str], *, threads: int | None = None, cache_bytes: int = LIMIT
) -> Compiled:
    """Load what `Compiled.save` wrote; nothing is measured or traced again.

    Args:
        path: of the file.
        threads: of the native kernels; None: as many as torch uses.
        cache_bytes: as of `compile`.

    Raises:
        CheckpointError: not a plan, of another version, or no native kernels to run it.
    """
    plan, error, times, shown = read_plan(path, threads, cache_bytes)
    return Compiled(plan, "program", error, times, shown=shown)
