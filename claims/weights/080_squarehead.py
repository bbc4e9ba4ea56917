"""SquareHead against cross-entropy alone when a pruned byte decoder is tuned on little text.

Up to 8 seeds: 3 left 90 % open.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, read_bytes, trained_decoder
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.training.distilling import Distillation
from sparseworks.training.planning import Sparse

LOSSES = {
    "ce": {},
    "squarehead": {"squarehead": 1.0},
    "raw features": {"features": 1.0},
    "kl": {"kl": 1.0},
}


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    novels = ByteText.novels(batch=16 if full else 8)
    raw = read_bytes(data_root() / "text" / "wikitext2-valid.txt")
    task = replace(novels, train=raw[:160_000], held=raw[-32_768:])
    few = replace(task, train=raw[:60_000])
    teacher = trained_decoder(novels)
    fit_bytes(teacher, task, steps=300 if full else 70, lr=2e-3, seed=seed)
    found = {"teacher": task.loss(teacher)}
    generator = torch.Generator().manual_seed(seed)
    calibration = [few.windows(generator) for _ in range(8)]
    for sparsity in (0.8, 0.9):
        pruned = copy.deepcopy(teacher)
        sw.prune(pruned, "sparsegpt", sparsity=sparsity, data=calibration)
        found[f"pruned {sparsity}"] = task.loss(pruned)
        for name, weights in LOSSES.items():
            if not full and name in ("raw features", "kl") and sparsity == 0.9:
                continue
            student = copy.deepcopy(pruned)
            fit_bytes(
                student, few, steps=250 if full else 70, lr=2e-3, seed=seed,
                sparse=Sparse("squarehead"),
                loss=Distillation.of({"task": 1.0, **weights}, teacher),
            )  # fmt: skip
            found[f"{name} {sparsity}"] = task.loss(student)
        gain = found[f"ce {sparsity}"] - found[f"squarehead {sparsity}"]
        found[f"over cross-entropy {sparsity}"] = gain
    found["over divergence"] = found["kl 0.8"] - found["squarehead 0.8"]
    return found


CLAIM = Claim(
    card="080",
    method="squarehead",
    title="learning what each block gave in the dense model helps a pruned model recover",
    model="byte decoder of width 64 with 2 blocks, tuned on the task, then pruned by SparseGPT",
    data="WikiText-2: 160 KB for the teacher, 60 KB for the student, the end held out; 70 steps",
    baseline="cross-entropy alone; divergence of the logits",
    metric="held-out loss, nats a byte",
    promises=(
        Promise("over cross-entropy 0.8", "80 %: below cross-entropy alone", negligible=0.01),
        Promise("over cross-entropy 0.9", "90 %: below cross-entropy alone", negligible=0.01),
        Promise("over divergence", "80 %: below cross-entropy with the logits' divergence"),
    ),
    measure=measure,
    looks=(3, 5, 8),
)
