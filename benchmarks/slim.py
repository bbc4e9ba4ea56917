"""ResNet-56 at half the operations: accuracy, latency, and Torch-Pruning in the same run.

    python benchmarks/slim.py probe           # choose score and peer variant on held-out images
    python benchmarks/slim.py train           # cut, fine-tune and test both sides, paired
    python benchmarks/slim.py latency         # time dense and cut in torch and onnxruntime, in turn
    python benchmarks/slim.py all             # what is not on disk yet, of everything
    python benchmarks/slim.py report --out benchmarks/results/slim.json

The cut models are fine-tuned on 45,000 of the 50,000 training images; the other 5,000 choose the
cut of either side (the dense checkpoint has seen them). Both sides are cut from the same
checkpoint, and trained with the same steps, batches, rates and teacher; seeds are those of the
fine-tuning. Every finished part is kept under `--folder`, the cut models too, so that a run that
was stopped goes on; `earlier *.json` there are results of cuts that were chosen before, and are
reported too.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.data.images import ImageSet, read_images
from sparseworks.diagnostics.claims import data_root, machine
from sparseworks.diagnostics.statistics import paired_interval
from sparseworks.models.coupling import trace
from sparseworks.models.zoo.resnet import CifarResNet, load_resnet
from sparseworks.weights.structured.measure import export_onnx
from sparseworks.weights.structured.recovery import finetune


@dataclass(frozen=True)
class Cut:
    """How ours cuts: score, rounds of scoring and cutting, multiple of the widths (onnxruntime
    computes 16 channels at a time with AVX-512), images in a calibration batch, where what is cut
    goes, options of the score."""

    score: str
    rounds: int = 1
    multiple: int | dict[str, int] = 8
    size: int = 128
    fold: Literal["mean", "linear"] = "mean"
    options: dict[str, Any] = field(default_factory=dict)


SINGLE = ("group-norm", "group-bn", "group-taylor", "group-fisher", "group-energy")
CUTS: dict[str, Cut] = {
    **{name: Cut(name) for name in SINGLE},
    "group-taylor, 4 rounds": Cut("group-taylor", 4, 8, 16),
    **{
        f"squared group-norm, 12 rounds, by {' '.join(map(str, by))}, linear": Cut(
            "group-norm", 12, {f"layer{i + 1}": m for i, m in enumerate(by)}, 128, "linear",
            {"root": False},
        )
        for by in ((2, 2, 2), (2, 2, 16), (2, 16, 2), (2, 16, 8), (2, 16, 16))
    },
}  # fmt: skip
SCORES = tuple(CUTS)
PEERS = ("global, all", "global, inner", "uniform, all", "uniform, inner")
STREAM = ["bn1", "layer*.bn2"]  # the residual streams stay whole: fewer copies around every block
BATCH, PROBE, HELD = 128, 60, 5000
RECIPE = {"lr": 0.03, "weight_decay": 5e-4, "temperature": 4.0, "weight": 0.9, "bf16": True}
SHARE = 0.5


def dense() -> CifarResNet:
    return load_resnet(data_root() / "models" / "resnet56-cifar10.safetensors")


def images(folder: Path, name: str) -> ImageSet:
    """The decoded set, kept as plain tensors between runs."""
    kept = folder / f"{name}.safetensors"
    from safetensors.torch import load_file, save_file

    if not kept.is_file():
        read = read_images(data_root() / "cifar10" / f"{name}.parquet")
        save_file({"pixels": read.pixels, "labels": read.labels}, kept)
    return ImageSet(**load_file(kept))


def parts(folder: Path) -> tuple[ImageSet, ImageSet]:
    """(45,000 images to fit, 5,000 to choose by) of the training set."""
    whole = images(folder, "train")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(56))
    held, fit = order[:HELD], order[HELD:]
    return (
        ImageSet(whole.pixels[fit], whole.labels[fit]),
        ImageSet(whole.pixels[held], whole.labels[held]),
    )


def ours(name: str, fit: ImageSet, seed: int) -> nn.Module:
    way = CUTS[name]
    data = fit.batches(way.size, samples=512, seed=seed)
    made = sw.slim(
        dense(), data[0][0][:2], flops=SHARE, method=way.score, data=data, round_to=way.multiple,
        iterations=way.rounds, exclude=STREAM, fold=way.fold, **way.options,
    )  # fmt: skip
    model: nn.Module = made.model
    return model


def theirs(variant: str) -> nn.Module:
    """Torch-Pruning's group-norm pruner, in small steps until the share is reached."""
    import torch_pruning as tp

    model, example = dense(), torch.randn(2, 3, 32, 32)
    ignored: list[nn.Module] = [model.linear]
    if variant.endswith("inner"):
        ignored.append(model.conv1)
        ignored += [b.conv2 for s in (model.layer1, model.layer2, model.layer3) for b in s]
    pruner = tp.pruner.GroupNormPruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=variant.startswith("global"), pruning_ratio=0.9, max_pruning_ratio=0.9,
        iterative_steps=400, ignored_layers=ignored,
    )  # fmt: skip
    goal = SHARE * tp.utils.count_ops_and_params(model, example)[0]
    while tp.utils.count_ops_and_params(model, example)[0] > goal:
        pruner.step()
    return model


def cut(name: str, folder: Path, fit: ImageSet) -> nn.Module:
    """The model of a variant of either side, from disk or cut now."""
    path = folder / f"cut {name}.pt"
    if not path.is_file():
        part = path.with_suffix(".part")
        torch.save(ours(name, fit, 0) if name in SCORES else theirs(name), part)
        part.replace(path)
    model: nn.Module = torch.load(path, weights_only=False)  # written above
    return model


def fit_batches(fit: ImageSet, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for x, y in fit.epoch(BATCH, generator):
            yield x.contiguous(memory_format=torch.channels_last), y

    return epoch


def train(model: nn.Module, fit: ImageSet, seed: int, steps: int) -> tuple[nn.Module, float]:
    """Fine-tune for `steps`; returns the model and the CPU seconds of this process."""
    epochs = -(-steps // (len(fit) // BATCH))
    model = model.to(memory_format=torch.channels_last)
    teacher = dense().to(memory_format=torch.channels_last)
    start = time.process_time()
    finetune(
        model, fit_batches(fit, seed), epochs=epochs, steps_per_epoch=steps // epochs,
        teacher=teacher, **RECIPE,
    )  # fmt: skip
    return model, time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    model = model.eval().to(memory_format=torch.channels_last)
    right = 0
    for part in torch.arange(len(data)).split(250):
        x = data.normalized(part).contiguous(memory_format=torch.channels_last)
        right += int((model(x).argmax(1) == data.labels[part]).sum())
    return 100 * right / len(data)


def size(model: nn.Module) -> dict[str, float]:
    flops = trace(model, torch.randn(2, 3, 32, 32)).flops()
    return {"flops": flops / 2, "parameters": sum(p.numel() for p in model.parameters())}


def keep(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is on disk, or made now and written."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    print(f"{path.stem} ...", flush=True)
    value = make()
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)
    print(f"  {value}", flush=True)
    return value


def probe(folder: Path) -> dict[str, dict[str, Any]]:
    fit, held = parts(folder)

    def one(name: str) -> dict[str, Any]:
        model = cut(name, folder, fit)
        before = accuracy(model, held)
        model, seconds = train(model, fit, 0, PROBE)
        return {"at the cut": before, "held-out": accuracy(model, held), "cpu seconds": seconds,
                **size(model)}  # fmt: skip

    return {
        name: keep(folder / f"probe {name}.json", partial(one, name)) for name in SCORES + PEERS
    }


def best(found: dict[str, dict[str, Any]], names: tuple[str, ...]) -> str:
    return max(names, key=lambda n: float(found[n]["held-out"]))


def paired(folder: Path, seeds: list[int], steps: int, sides: tuple[str, ...]) -> None:
    """Both sides are cut once; the seeds are those of the fine-tuning."""
    chosen = probe(folder)
    (fit, _), test = parts(folder), images(folder, "test")

    def one(name: str, seed: int) -> dict[str, Any]:
        model, seconds = train(cut(name, folder, fit), fit, seed, steps)
        return {"name": name, "accuracy": accuracy(model, test), "cpu seconds": seconds,
                "steps": steps, **size(model)}  # fmt: skip

    for seed in seeds:
        for side in sides:
            name = best(chosen, SCORES if side == "ours" else PEERS)
            keep(folder / f"{steps} {seed} {side}.json", partial(one, name, seed))


def latency(folder: Path, batch: int = 64, repeats: int = 25) -> dict[str, Any]:
    """Milliseconds of dense, ours and the peer's, all runs in turn: wall and CPU time.

    CPU time is what counts where other programs share the machine.
    """
    import onnxruntime

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    chosen, (fit, _) = probe(folder), parts(folder)
    x = fit.normalized(slice(0, batch))
    models = {
        "dense": dense(),
        "ours": cut(best(chosen, SCORES), folder, fit),
        "peer": cut(best(chosen, PEERS), folder, fit),
    }
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for name, model in models.items():
            path = export_onnx(model.eval(), x, Path(place) / f"{name}.onnx")
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            feed = {session.get_inputs()[0].name: x.numpy()}
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)
            y = x.contiguous(memory_format=torch.channels_last)
            runs[name, "onnxruntime"] = lambda s=session, f=feed: s.run(None, f)
            runs[name, "torch eager"] = lambda m=model: m(x)
            runs[name, "torch eager, channels_last"] = lambda m=last, y=y: m(y)
        seen: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
        for turn in range(repeats + 2):
            for key, run in runs.items():
                start, spent = time.perf_counter(), time.process_time()
                run()
                if turn >= 2:
                    wall, cpu = time.perf_counter() - start, time.process_time() - spent
                    seen[key].append((1e3 * wall, 1e3 * cpu))
    found: dict[str, Any] = {
        "ours": best(chosen, SCORES), "peer": best(chosen, PEERS), "batch": batch,
        "repeats": repeats, "threads": torch.get_num_threads(),
    }  # fmt: skip
    for runtime in ("torch eager", "torch eager, channels_last", "onnxruntime"):
        rows = {}
        for n in models:
            wall, cpu = (sorted(v) for v in zip(*seen[n, runtime]))
            rows[n] = {"median_ms": statistics.median(wall), "min_ms": wall[0],
                       "cpu_median_ms": statistics.median(cpu), "cpu_min_ms": cpu[0]}  # fmt: skip
        faster = {
            f"{n}, {kind}": rows["dense"][kind] / rows[n][kind]
            for n in ("ours", "peer")
            for kind in ("median_ms", "cpu_median_ms")
        }
        found[runtime] = {**rows, "speedup": faster}
    return found


def whole(folder: Path) -> dict[str, Any]:
    """The dense checkpoint: what every loss is counted from."""
    model = dense()
    return {"accuracy": accuracy(model, images(folder, "test")), **size(model)}


def report(folder: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    """What is on disk; differences only of the seeds that have both sides."""

    def there(pattern: str) -> dict[str, Any]:
        return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob(f"{pattern}.json"))}

    runs = {
        s: {
            side: found
            for side in ("ours", "peer")
            for found in there(f"{steps} {s} {side}").values()
        }
        for s in seeds
    }
    found: dict[str, Any] = {
        "machine": machine(),
        "recipe": {**RECIPE, "batch": BATCH, "steps": steps, "teacher": "the dense model",
                   "residual streams": "whole (ours)", "flops share": SHARE},
        "dense": next(iter(there("dense").values()), None),
        "probe on held-out training images": there("probe *"),
        "seeds": runs,
        "earlier choices": list(there("earlier *").values()),
        "other numbers of steps": [
            v for k, v in there("[0-9]*").items() if not k.startswith(f"{steps} ")
        ],
        "latency": next(iter(there("latency").values()), None),
    }  # fmt: skip
    pairs = [r for r in runs.values() if len(r) == 2]
    if found["dense"] and pairs:
        losses = [found["dense"]["accuracy"] - p["ours"]["accuracy"] for p in pairs]
        found["loss of ours, points"] = {"mean": statistics.mean(losses), "worst": max(losses)}
    if pairs:
        gains = paired_interval([p["ours"]["accuracy"] - p["peer"]["accuracy"] for p in pairs])
        found["ours minus peer, points"] = {
            "mean": gains.mean,
            "pairs": len(pairs),
            "interval": [gains.low, gains.high] if len(pairs) > 1 else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("part", choices=("probe", "train", "latency", "all", "report"))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/slim"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--side", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if given.part in ("probe", "all"):
        probe(folder)
    if given.part in ("train", "all"):
        paired(folder, given.seed, given.steps, tuple(given.side))
    if given.part in ("latency", "all"):
        keep(folder / "dense.json", lambda: whole(folder))
        keep(folder / "latency.json", lambda: latency(folder))
    if given.part in ("report", "all"):
        text = json.dumps(report(folder, given.seed, given.steps), indent=1)
        if given.out:
            given.out.write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
