"""What TensorBoard, W&B and MLflow kept of a training: figure -> [(step, value), ...]."""

from __future__ import annotations

import json

import pytest


def from_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def from_mlflow(folder):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient((folder / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("sparseworks")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


def records(path, head=7, block=32768):
    """The records of a file in LevelDB's log format, behind W&B's own head of 7 bytes."""
    data, at, whole = path.read_bytes(), head, b""
    while at + head <= len(data):
        if block - at % block < head:  # the rest of a block is empty
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + head : at + head + size]
        at += head + size
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def from_wandb(folder):
    """What the offline runs hold, in the order of the runs."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    __import__("wandb").teardown()  # what its process still holds is in the files then
    figures, runs = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(proto.Record.FromString, records(path)):
            if record.WhichOneof("record_type") == "run":
                runs.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                step = row.pop("step", None) or row.pop("train/global_step")
                for name in row:
                    if not name.startswith("_"):
                        figures.setdefault(name, []).append((step, row[name]))
    assert len(runs) == 1
    return figures


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "mlflow": from_mlflow}
