"""Where the figures of a training go while it runs: TensorBoard, Weights & Biases, MLflow.

    with sw.open_log("tensorboard", "mlflow", folder="runs/rigl") as log:
        trace = Trace(run, every=100, log=log)
        ...  # after every step: trace.look(step, loss.detach())

Nothing needs a network: all three write into the folder, unless their own settings (WANDB_MODE,
MLFLOW_TRACKING_URI) say where else.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparseworks.core.errors import InvalidArgument, MissingDependency
from sparseworks.io.atomic import atomic_file

__all__ = ["TRACKERS", "Log", "Writer", "check_trackers", "figures_of", "join_log", "open_log"]

TRACKERS = ("tensorboard", "wandb", "mlflow")
_IDS = "tracking.json"  # in the folder: which runs of W&B and MLflow are this training's


class Writer(Protocol):
    """One place that takes figures."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Log:
    """Several writers as one; a context manager that closes them.

    Args:
        writers: where the figures go; with none, nowhere.
    """

    def __init__(self, writers: Iterable[Writer] = ()) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name, after so many optimizer steps."""
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        """Write out what is held back."""
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def figures_of(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """A row of a `Trace` as named figures: loss, masks/sparsity, sparsity/<tensor>, ..."""
    figures = {"loss": row["loss"]}
    for name in ("sparsity", "churn", "explored", "flips", "moved"):
        if name in row:
            figures[f"masks/{name}"] = row[name]
    return figures | {f"sparsity/{n}": z for n, z in zip(names, row.get("tensors", ()))}


def open_log(
    *trackers: str,
    folder: str | os.PathLike[str],
    about: Mapping[str, Any] | None = None,
    step: int = 0,
) -> Log:
    """Open the log of a training in its folder, or go on with the one that is there.

    tensorboard writes events into `folder`/tensorboard; wandb an offline run into `folder`/wandb
    (`wandb sync` sends it; WANDB_MODE=online sends at once); mlflow a file store `folder`/mlruns
    (or wherever MLFLOW_TRACKING_URI points). A second call on the same folder goes on with the
    same run of W&B and of MLflow; its steps count from `step`.

    Args:
        trackers: any of "tensorboard", "wandb", "mlflow".
        folder: of the training; it is made where it is not there.
        about: what the training is, in plain values; W&B and MLflow keep it.
        step: steps that were taken already, of a training that goes on.

    Raises:
        InvalidArgument: an unknown tracker.
        MissingDependency: its package is not installed.
    """
    check_trackers(trackers)
    folder, about = Path(folder), dict(about or {})
    folder.mkdir(parents=True, exist_ok=True)
    return Log([_OPENED[name](folder, about, step) for name in dict.fromkeys(trackers)])


def join_log(trackers: Iterable[str], events: Path | None = None, axis: str = "step") -> Log:
    """A log into what another program, a trainer say, has open; it ends none of its runs.

    Args:
        trackers: by name; those that are not ours, or have nothing open, are passed over.
        events: the folder with TensorBoard's events.
        axis: the figure by which W&B counts steps there.
    """
    writers: list[Writer] = []
    if "tensorboard" in trackers and events is not None:
        writers.append(TensorBoard(events))
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            writers.append(WandB(wandb.run, axis, ours=False))
    if "mlflow" in trackers:
        import mlflow

        if (run := mlflow.active_run()) is not None:
            writers.append(MLflow(mlflow.MlflowClient(), run.info.run_id, ours=False))
    return Log(writers)


def check_trackers(trackers: Iterable[str]) -> None:
    """Refuse names that are no tracker, and trackers that are not installed.

    Raises:
        InvalidArgument, MissingDependency: as `open_log`.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise InvalidArgument(f"no tracker {name!r}; use some of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            package = "mlflow-skinny" if name == "mlflow" else name
            raise MissingDependency(
                f"logging to {name} needs {package}: pip install 'sparseworks[tracking]'"
            )


class TensorBoard:
    """Events in a folder.

    Args:
        folder: of the events.
        step: events of later steps that are there count no more; None: all count.
    """

    def __init__(self, folder: Path, step: int | None = None) -> None:
        from torch.utils import tensorboard

        made: Any = tensorboard.SummaryWriter
        self._writer = made(str(folder), purge_step=None if step is None else step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases.

    Args:
        run: an open one.
        axis: the figure that counts the steps.
        ours: close it with the log.
    """

    def __init__(self, run: Any, axis: str = "step", ours: bool = True) -> None:
        self._run, self._axis, self._ours = run, axis, ours

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, self._axis: step})

    def close(self) -> None:
        if self._ours:
            self._run.finish()


class MLflow:
    """A run of MLflow.

    Args:
        client: of the store.
        run: the id of the run.
        ours: end it with the log.
    """

    def __init__(self, client: Any, run: str, ours: bool = True) -> None:
        self._client, self._run, self._ours = client, run, ours

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        if self._ours:
            self._client.set_terminated(self._run)


def _tensorboard(folder: Path, about: Mapping[str, Any], step: int) -> Writer:
    return TensorBoard(folder / "tensorboard", step)


def _wandb(folder: Path, about: Mapping[str, Any], step: int) -> Writer:
    import wandb

    known = _ids(folder).get("wandb")
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(
        dir=str(folder),
        id=known,
        resume=None if known is None else "allow",
        project=os.environ.get("WANDB_PROJECT", "sparseworks"),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        config=dict(about),
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("*", step_metric="step")
    _keep(folder, wandb=run.id)
    return WandB(run)


def _mlflow(folder: Path, about: Mapping[str, Any], step: int) -> Writer:
    from mlflow import MlflowClient

    given = os.environ.get("MLFLOW_TRACKING_URI")
    # newer versions of MLflow take a store of plain files only where this is said
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=given or (folder / "mlruns").resolve().as_uri())
    if (known := _ids(folder).get("mlflow")) is not None:
        client.update_run(known, status="RUNNING")
        return MLflow(client, known)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sparseworks")
    experiment = client.get_experiment_by_name(name)
    number = client.create_experiment(name) if experiment is None else experiment.experiment_id
    run = client.create_run(number, run_name=folder.resolve().name)
    for key, value in about.items():
        client.log_param(run.info.run_id, key, value)
    _keep(folder, mlflow=run.info.run_id)
    return MLflow(client, run.info.run_id)


_OPENED = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def _ids(folder: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((folder / _IDS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _keep(folder: Path, **ids: str) -> None:
    with atomic_file(folder / _IDS) as file:
        file.write_text(json.dumps({**_ids(folder), **ids}) + "\n")
