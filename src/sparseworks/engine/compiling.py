"""`sparseworks.compile`: the fastest of three ways to run a model that computes the same.

- *program*: the model is captured as a graph; what the native code knows runs as one program
  (convolutions and linear layers skip their zeros; norms, activations, residuals and attention stay
  in its layout), torch runs what is left.
- *layers*: for models that cannot be captured, linear layers are replaced one by one.
- *torch*: the model itself, where neither is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.explaining import layer_lines, program_lines
from sparseworks.engine.graph import arguments, capture
from sparseworks.engine.layers import LayerPlan, by_layers
from sparseworks.engine.measuring import difference, interleaved_ms, tensors_of
from sparseworks.engine.plan import Plan, make_plan
from sparseworks.kernels.native import available, instruction_set
from sparseworks.models.calls import call, split

__all__ = ["Compiled", "compile"]

_TOLERANCE = 1e-4  # of a program against the model


class Compiled:
    """A compiled model: call it as the model it was made from.

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

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

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
        from sparseworks.engine.saving import save_plan

        if self.plan is None:
            raise InvalidArgument(
                f"this model runs as {self.kind}, which has no plan of its own: save the model"
            )
        save_plan(self.plan, path, self.error, self.times)


def compile(model: nn.Module, example: Any, *, threads: int | None = None) -> Compiled:
    """Make a sparse model skip its zeros, in the way that is measured to be fastest.

    Args:
        model: fp32 on the CPU; left as it is.
        example: one batch as the model takes it (Tensor, mapping, or (inputs, target)); candidates
            are measured on it. Other batch sizes, and other lengths of sequences, run too.
        threads: of the native kernels; None: as many as torch uses.

    Returns:
        A callable with `explain()` and `save(path)`.

    Raises:
        ModelError: not on the CPU, or weights that are not finite.
        InvalidArgument: the example does not fit the model, or a forced instruction set is missing.
    """
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise ModelError(f"{name} is not on the CPU; compile takes models on the CPU")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: NaN or Inf; nothing was compiled")
    instruction_set()
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InvalidArgument(f"threads={threads}: at least one is needed")
    quiet = copy.deepcopy(model).eval()
    inputs, _ = split(example)
    args, kwargs = arguments(inputs)
    expected = tensors_of(_checked(quiet, inputs))
    notes: list[str] = []
    plan, error = _program(quiet, args, kwargs, threads, expected, notes)
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: call(quiet, inputs)}
    if plan is not None:
        ways["program"] = lambda: plan(*args, **kwargs)
    times = dict(zip(ways, interleaved_ms(*ways.values()), strict=True))
    if plan is not None and times["program"] < times["torch"]:
        return Compiled(plan, "program", error, times, notes)
    twin, layers, found = by_layers(model, inputs, threads)
    if any(p.kernel != "dense" for p in layers):
        ways["layers"] = lambda: call(twin, inputs)
        times = dict(zip(ways, interleaved_ms(*ways.values()), strict=True))
    best = min(times, key=lambda way: times[way])
    if best == "layers":
        return Compiled(twin, best, difference(expected, found), times, notes, tuple(layers))
    if best == "program" and plan is not None:
        return Compiled(plan, best, error, times, notes)
    return Compiled(quiet, "torch", 0.0, times, notes, tuple(layers))


@torch.no_grad()
def _checked(model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvalidArgument(f"the example does not fit the model: {error}") from error


def _program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int,
    expected: list[Tensor],
    notes: list[str],
) -> tuple[Plan | None, float]:
    """The model as a program, where it can be captured and computes the same."""
    if not available():
        notes.append("no program: the native kernels are not built")
        return None, 0.0
    try:
        plan = make_plan(capture(model, args, kwargs), threads)
    except Exception as error:  # torch.export raises whatever the model makes it raise
        first = str(error).strip().splitlines() or [""]
        notes.append(f"no program: {type(error).__name__}: {first[0][:160]}")
        return None, 0.0
    if plan is None:
        notes.append("no program: no layer that the native code takes")
        return None, 0.0
    try:
        found = tensors_of(plan(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, ModelError) as error:
        notes.append(f"no program: it failed on the example ({error})")
        return None, 0.0
    error_found = difference(expected, found) if len(found) == len(expected) else float("inf")
    if not error_found <= _TOLERANCE:
        notes.append(f"no program: its relative error on the example is {error_found:.1e}")
        return None, 0.0
    return plan, error_found
