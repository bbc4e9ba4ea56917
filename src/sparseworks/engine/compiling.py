"""`sparseworks.compile`: the fastest of three ways to run a model that computes the same.

- *program*: the model is captured as a graph; what the native code knows runs as one program
  (convolutions and linear layers skip their zeros; norms, activations, residuals and attention stay
  in its layout), torch runs what is left.
- *layers*: for models that cannot be captured, linear layers are replaced one by one.
- *torch*: the model itself, where neither is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.attributes import Attributes
from sparseworks.engine.compiled import Compiled, Eager
from sparseworks.engine.explaining import left_dense
from sparseworks.engine.graph import Captured, capture
from sparseworks.engine.ir import Precision
from sparseworks.engine.layers import LayerPlan, by_layers
from sparseworks.engine.measuring import difference, interleaved_ms, tensors_of
from sparseworks.engine.origin import Origin
from sparseworks.engine.outside import outside
from sparseworks.engine.plan import Plan, make_plan
from sparseworks.engine.recent import LIMIT
from sparseworks.kernels.native import available, instruction_set
from sparseworks.models.calls import Arguments, Example, call
from sparseworks.models.hooks import folded

__all__ = ["compile"]

# of a program against the model
_TOLERANCES = {Precision.FP32: 1e-4, Precision.BF16: 5e-2, Precision.INT8: 0.25}
_PRECISIONS = {
    None: Precision.FP32, torch.float32: Precision.FP32, torch.bfloat16: Precision.BF16,
    torch.int8: Precision.INT8,
}  # fmt: skip


def compile(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    cache_bytes: int = LIMIT,
) -> Compiled:
    """Make a sparse model skip its zeros, in the way that is measured to be fastest.

    Args:
        model: fp32 on the CPU; left as it is. Language models of transformers return no cache of
            keys and values then; `compile_decoder` is for generating.
        example: what the model is called with: a tensor, a tuple or list of positional arguments,
            or a mapping of keywords; candidates are measured on it. Other batch sizes, lengths of
            sequences and heights and widths of images run too, where the model takes them.
        dtype: fp32, or bf16: products may round weights and inputs to bf16 where that is faster
            (sums, norms, activations, residuals, inputs and outputs of the model stay fp32). Or
            int8: w = s q with whole q in [-127, 127] and a scale s = max|w| / 127 for every row of
            a weight (output channel), x likewise for every token or image, found in each call; sums
            are exact, all else fp32. None is fp32.
        threads: of the native kernels; None: as many as torch uses.
        cache_bytes: of what is kept for sizes that were met, 8 MiB; the least recently used go
            first. To lay a new size out takes milliseconds; weights are packed once for all sizes.

    Returns:
        A module with `explain()`, `save(path)` and `error`, to be called as the model is, with the
        arguments that the example gives: by place or by name, whichever the example used.

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
    model, whole = folded(model), model
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InvalidArgument(f"threads={threads}: at least one is needed")
    origin = Origin(whole)
    quiet = copy.deepcopy(model).eval()
    if getattr(getattr(quiet, "config", None), "use_cache", False):
        quiet.config.use_cache = False  # type: ignore[union-attr]
    given = Arguments.of(example)
    args, kwargs = given.args, dict(given.kwargs)
    expected = tensors_of(_checked(quiet, given))
    notes: list[str] = []
    if hooked := {n for n, _ in whole.named_parameters()} - {
        n for n, _ in model.named_parameters()
    }:
        notes.append(f"what hooks compute weights from is folded: {', '.join(sorted(hooked))}")
    runs: dict[str, Plan | Eager] = {"torch": Eager(quiet, dtype == torch.bfloat16)}
    errors = {"torch": 0.0}
    precisions = list(dict.fromkeys((Precision.FP32, _PRECISIONS[dtype])))
    if dtype == torch.bfloat16:
        errors["torch"] = _error(runs["torch"], args, kwargs, expected)
    captured = _captured(quiet, args, kwargs, notes)
    if captured is not None:
        for precision in precisions:
            way = _way("program, {}", precision)
            plan, error = _program(
                captured, args, kwargs, threads, precision, cache_bytes, expected, notes
            )
            if plan is not None:
                runs[way], errors[way] = plan, error
    times = _times(runs, args, kwargs)
    best = min(times, key=lambda way: times[way])
    shown = Attributes.of(quiet)
    layers: list[LayerPlan] = []
    if not isinstance(runs[best], Plan):
        twin, layers, found = by_layers(model, given, threads)
        if any(p.kernel != "dense" for p in layers):
            runs["layers"], errors["layers"] = Eager(twin), difference(expected, found)
            times = _times(runs, args, kwargs)
            best = min(times, key=lambda way: times[way])
    run = runs[best]
    kind, kept, spent = best, tuple(layers), None
    if isinstance(run, Plan):
        kind, kept, spent = "program", (), outside(run, args, kwargs)
    left = left_dense(model, kind, run, kept)
    return Compiled(run, kind, errors[best], times, notes, kept, shown, origin, left, spent)


def _way(name: str, precision: Precision) -> str:
    return "program" if precision == Precision.FP32 else name.format(precision.name.lower())


def _times(
    runs: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
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
def _checked(model: nn.Module, given: Arguments) -> Any:
    given.bound(model)
    try:
        return call(model, given)
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
    cache_bytes: int,
    expected: list[Tensor],
    notes: list[str],
) -> tuple[Plan | None, float]:
    """The graph as a program, where that computes the same."""
    name = _way("program in {}", precision)
    try:
        plan = make_plan(captured, threads, precision, cache_bytes)
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
