"""What `sparseworks train` says and leaves behind: lines, events, the output folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from sparseworks.cli.training import Job
from sparseworks.core.errors import DataError


def fresh_folder(out: Path) -> None:
    """An empty output folder; what stood there goes (--force was given)."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)


def open_log_of(options: Any, step: int) -> Any:
    """The log that --log names; without it TensorBoard's, where the package is installed."""
    from sparseworks.cli.running import plain_options
    from sparseworks.training.logs import open_log

    by_default = options.tensorboard and importlib.util.find_spec("tensorboard") is not None
    trackers = options.log or (("tensorboard",) if by_default else ())
    about = {k: v for k, v in plain_options(options).items() if v not in (None, (), [])}
    return open_log(*trackers, folder=options.out, about=about, step=step)


def say_epoch(row: dict[str, float], epochs: int) -> None:
    """One line per epoch on standard error."""
    words = [f"epoch {row['epoch']:g}/{epochs}", f"loss {row['loss']:.4f}"]
    if "sparsity" in row:
        words.append(f"sparsity {row['sparsity']:.2%}")
    known = {"epoch", "step", "loss", "seconds", "sparsity"}
    words += [f"{name} {value:.4g}" for name, value in row.items() if name not in known]
    print("  ".join([*words, f"{row['seconds']:.1f} s"]), file=sys.stderr)


def twin_of(options: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Result and trace of the training to draw beside this one.

    Raises:
        DataError: the folder holds no finished training.
    """
    if options.twin is None:
        return None
    found = []
    for name in ("result.json", "trace.json"):
        try:
            found.append(json.loads((options.twin / name).read_text()))
        except (OSError, ValueError) as error:
            raise DataError(
                f"--twin {options.twin}: holds no finished training of sparseworks train "
                f"({name}: {error})"
            ) from None
    return found[0], found[1]


def finish(job: Job, options: Any, twin: Any, record_of: Any = None) -> dict[str, Any]:
    """Zeros exact, model saved, result written; then the state is no longer needed.

    Args:
        record_of: `(job, options, score, machine)`, what `sparseworks audit` reads; None: nothing.
    """
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.diagnostics.claims import machine
    from sparseworks.io import save

    training, out = job.training, options.out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `_shortfall` says more
        record = training.run.finish() if training.run is not None else None
    model = training.model.eval()
    folder = hasattr(model, "config") and hasattr(model, "save_pretrained")
    target = out / ("checkpoint" if folder else "model.safetensors")
    save(model, target, tokenizer=job.tokenizer if folder else None)
    summary: dict[str, Any] = {
        "options": plain_options(options),
        "class": type(model).__name__,
        "steps": training.steps,
        "history": training.history,
        "sparsity": 0.0 if record is None else record.sparsity(),
        "tensors": {} if record is None else {n: record.sparsity(n) for n in record},
        "warnings": [*_shortfall(training, record, options.sparsity), *_foreign(model, folder)],
        "metric": None,
        "checkpoint": str(target),
        "machine": machine(),
    }
    if job.metric is not None:
        metric = job.metric
        summary["metric"] = {"name": metric.name, "unit": metric.unit,
                             "before": job.before, "after": metric(model)}  # fmt: skip
    score = None if job.metric is None else summary["metric"]["after"]
    if record_of is not None:
        summary["record"] = record_of(job, options, score, summary["machine"])
    trace = training.trace.report()
    write_json(out / "trace.json", trace)
    if importlib.util.find_spec("plotly") is not None:
        from sparseworks.report.training import write_training

        write_training(out / "report.html", summary, trace, twin)
    write_json(out / "result.json", summary)
    (out / "state.safetensors").unlink(missing_ok=True)
    shutil.rmtree(out / "states", ignore_errors=True)
    return summary


def _shortfall(training: Any, record: Any, wanted: float | None) -> list[str]:
    """A loss scaler skips steps that overflow, and a schedule that ends with the training then
    never ends."""
    if record is None or wanted is None or record.sparsity() >= wanted - 0.005:
        return []
    return [
        f"the sparsity is {record.sparsity():.2%}, not {wanted:.2%}: the masks saw "
        f"{training.run.step} of {training.steps} steps, the others overflowed; use --amp bf16, or "
        "an earlier --option end=..."
    ]


def _foreign(model: Any, folder: bool) -> list[str]:
    """transformers builds the layers of its own classes from a folder, and no others."""
    own = [n for n, m in model.named_modules() if type(m).__module__.startswith("sparseworks.weig")]
    if not folder or not own:
        return []
    return [
        f"{own[0]} is a layer of this method, which transformers does not know: the folder loads "
        "into a model that was transformed in the same way; --option after=merged, where the "
        "method has it, leaves ordinary layers"
    ]


def finished_result(out: Path) -> dict[str, Any] | None:
    """The result of a training that ended, or None."""
    path = out / "result.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def show(summary: dict[str, Any], options: Any, how: str) -> None:
    """The result in the terminal."""
    if options.json:
        print(json.dumps(summary, indent=1, default=str))
        return
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    metric = summary["metric"]
    words = [f"{summary['steps']} steps", f"sparsity {summary['sparsity']:.2%}"]
    if metric is not None:
        before = "" if metric["before"] is None else f"{metric['before']:.4g} -> "
        words.append(f"{metric['name']} {before}{metric['after']:.4g} {metric['unit']}".strip())
    print(f"{how}{', '.join(words)}; the model is {summary['checkpoint']}")
