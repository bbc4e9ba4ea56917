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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.types import dense_lines
from sparseworks.engine.explaining import layer_lines, left_dense, program_lines
from sparseworks.engine.graph import Captured, arguments, capture
from sparseworks.engine.ir import Precision
from sparseworks.engine.layers import LayerPlan, by_layers
from sparseworks.engine.measuring import difference, interleaved_ms, tensors_of
from sparseworks.engine.part import check_shape
from sparseworks.engine.plan import Plan, make_plan
from sparseworks.kernels.native import available, instruction_set
from sparseworks.models.calls import call, split
from sparseworks.models.hooks import folded

__all__ = ["Compiled", "compile"]

# of a program against the model
_TOLERANCES = {Precision.FP32: 1e-4, Precision.BF16: 5e-2, Precision.INT8: 0.25}
_PRECISIONS = {
    None: Precision.FP32, torch.float32: Precision.FP32, torch.bfloat16: Precision.BF16,
    torch.int8: Precision.INT8,
}  # fmt: skip


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
        skipped: name -> why its zeros are not skipped, of every parameter of two or more axes that
            no kernel here runs.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kind: str,
        error: float = 0.0,
        times: dict[str, float] | None = None,
        notes: list[str] | None = None,
        layers: tuple[LayerPlan, ...] = (),
        skipped: dict[str, str] | None = None,
    ) -> None:
        self.run, self.kind, self.error = run, kind, error
        self.times, self.notes, self.layers = times or {}, notes or [], layers
        self.skipped = skipped or {}

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
        lines += dense_lines(self.skipped)
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


def compile(
    model: nn.Module, example: Any, *, dtype: torch.dtype | None = None, threads: int | None = None
) -> Compiled:
    """Make a sparse model skip its zeros, in the way that is measured to be fastest.

    Args:
        model: fp32 on the CPU; left as it is. Language models of transformers return no cache of
            keys and values then; `compile_decoder` is for generating.
        example: one batch as the model takes it (Tensor, mapping, or (inputs, target)); candidates
            are measured on it. Other batch sizes, and other lengths of sequences, run too.
        dtype: fp32, or bf16: products may round weights and inputs to bf16 where that is faster
            (sums, norms, activations, residuals, inputs and outputs of the model stay fp32). Or
            int8: w = s q with whole q in [-127, 127] and a scale s = max|w| / 127 for every row of
            a weight (output channel), x likewise for every token or image, found in each call; sums
            are exact, all else fp32. None is fp32.
        threads: of the native kernels; None: as many as torch uses.

    Returns:
        A callable with `explain()`, `save(path)` and `error`.

    Raises:
        ModelError: not on the CPU, or weights that are not finite.
        InvalidArgument: the example does not fit the model, another dtype, or a forced instruction
            set is missing.
    """
    if dtype not in _PRECISIONS:
        raise InvalidArgument(
            f"dtype={dtype}: compile runs in torch.float32, torch.bfloat16 or torch.int8"
        )
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise ModelError(f"{name} is not on the CPU; compile takes models on the CPU")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: NaN or Inf; nothing was compiled")
    instruction_set()
    model, given = folded(model), model
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InvalidArgument(f"threads={threads}: at least one is needed")
    quiet = copy.deepcopy(model).eval()
    if getattr(getattr(quiet, "config", None), "use_cache", False):
        quiet.config.use_cache = False  # type: ignore[union-attr]
    inputs, _ = split(example)
    args, kwargs = arguments(inputs)
    expected = tensors_of(_checked(quiet, inputs))
    notes: list[str] = []
    if hooked := {n for n, _ in given.named_parameters()} - {
        n for n, _ in model.named_parameters()
    }:
        notes.append(f"what hooks compute weights from is folded: {', '.join(sorted(hooked))}")
    runs: dict[str, Callable[..., Any]] = {"torch": quiet}
    errors = {"torch": 0.0}
    precisions = list(dict.fromkeys((Precision.FP32, _PRECISIONS[dtype])))
    if dtype == torch.bfloat16:
        runs["torch"] = _Autocast(quiet)
        errors["torch"] = _error(runs["torch"], args, kwargs, expected)
    captured = _captured(quiet, args, kwargs, notes)
    if captured is not None:
        for precision in precisions:
            way = _way("program, {}", precision)
            plan, error = _program(captured, args, kwargs, threads, precision, expected, notes)
            if plan is not None:
                runs[way], errors[way] = plan, error
    times = _times(runs, args, kwargs)
    best = min(times, key=lambda way: times[way])
    if isinstance(runs[best], Plan):
        left = left_dense(model, "program", runs[best], ())
        return Compiled(runs[best], "program", errors[best], times, notes, (), left)
    twin, layers, found = by_layers(model, inputs, threads)
    if any(p.kernel != "dense" for p in layers):
        runs["layers"], errors["layers"] = twin, difference(expected, found)
        times = _times(runs, args, kwargs)
        best = min(times, key=lambda way: times[way])
    kind = "program" if isinstance(runs[best], Plan) else best
    kept = () if kind == "program" else tuple(layers)
    left = left_dense(model, kind, runs[best], kept)
    return Compiled(runs[best], kind, errors[best], times, notes, kept, left)


def _way(name: str, precision: Precision) -> str:
    return "program" if precision == Precision.FP32 else name.format(precision.name.lower())


class _Autocast:
    """A model whose products torch runs in bf16."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            made = self.model(*args, **kwargs)
        return tree_map(
            lambda t: t.float() if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t, made
        )


def _times(
    runs: dict[str, Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    calls = [partial(run, *args, **kwargs) for run in runs.values()]
    return dict(zip(runs, interleaved_ms(*calls), strict=True))


@torch.no_grad()
def _error(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], expected: list[Tensor]
) -> float:
    found = tensors_of(run(*args, **kwargs))
    return difference(expected, found) if len(found) == len(expected) else float("inf")


@torch.no_grad()
def _checked(model: nn.Module, inputs: Any) -> Any:
    try:
        return call(model, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvalidArgument(f"the example does not fit the model: {error}") from error


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str]
) -> Captured | None:
    """The model as a graph, where native code could run it and it can be followed."""
    if not available():
        notes.append("no program: the native kernels are not built")
        return None
    try:
        return capture(model, args, kwargs)
    except Exception as error:  # torch.export raises whatever the model makes it raise
        notes.append(_refusal("program", error))
        return None


def _refusal(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"no {name}: {type(error).__name__}: {first[0][:160]}"


def _program(
    captured: Captured,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    threads: int,
    precision: Precision,
    expected: list[Tensor],
    notes: list[str],
) -> tuple[Plan | None, float]:
    """The graph as a program, where that computes the same."""
    name = _way("program in {}", precision)
    try:
        plan = make_plan(captured, threads, precision)
    except Exception as error:  # whatever the rules meet in a graph that they were not made for
        notes.append(_refusal(name, error))
        return None, 0.0
    if plan is None:
        notes.append(f"no {name}: no layer that the native code takes")
        return None, 0.0
    try:
        found = _error(plan, args, kwargs, expected)
    except (RuntimeError, TypeError, ValueError, ModelError) as error:
        notes.append(f"no {name}: it failed on the example ({error})")
        return None, 0.0
    if not found <= _TOLERANCES[precision]:
        notes.append(f"no {name}: its relative error on the example is {found:.1e}")
        return None, 0.0
    return plan, found
