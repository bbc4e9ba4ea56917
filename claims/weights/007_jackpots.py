"""Lottery jackpots at 90 %: a trained ResNet-20 searched by scores, its weights untouched."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import ImageSet, augment
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.diagnostics.subjects import image_subject
from sparseworks.models.zoo import load_resnet
from sparseworks.training.recalibration import reestimate

SPARSITY = 0.9
BATCH = 64


def search(
    dense: nn.Module, train: ImageSet, steps: int, seed: int, **options: object
) -> nn.Module:
    """The paper's recipe: SGD on the scores, 0.1 on a cosine, momentum 0.9, weight decay 5e-4."""
    model = copy.deepcopy(dense)
    job = sw.transform(model, "jackpots", sparsity=SPARSITY, steps=steps, seed=seed, **options)
    groups = job.parameter_groups(weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    job.attach(optimizer)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(train), (BATCH,), generator=generator)
        x = augment(train.normalized(index), generator).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(x), train.labels[index]).backward()
        optimizer.step()
        schedule.step()
    job.finish()
    return model.eval()


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    train, held = image_subject(seed, 50_000 if full else 5_000, held=10_000 if full else 2_000)
    statistics = train.batches(250, samples=2_000 if full else 1_000)
    steps = 5 * len(train) // BATCH if full else 120
    dense = load_resnet(data_root() / "models" / "resnet20-cifar10.safetensors")
    dense = dense.to(memory_format=torch.channels_last)
    found = {}
    models = {"magnitude": sw.prune(dense, "magnitude", sparsity=SPARSITY, budget="global",
                                    copy=True).model}  # fmt: skip
    models["jackpot"] = search(dense, train, steps, seed)
    models["unrestricted"] = search(dense, train, steps, seed, restrict=False)
    models["random first"] = search(dense, train, steps, seed, first="random")
    models["a third of the steps"] = search(dense, train, steps // 3, seed)
    for name, model in models.items():
        reestimate(model, statistics)
        found[f"{name} accuracy"] = held(model)
    ours, plain = sw.masks(models["jackpot"]), sw.masks(models["magnitude"])
    both = sum(int((ours[n] & plain[n]).sum()) for n in ours)
    found["overlap"] = both / sum(int(ours[n].sum()) for n in ours)
    # two masks of the same densities per tensor that know nothing of each other
    chance = sum(int(ours[n].sum()) ** 2 / ours[n].numel() for n in ours)
    found["overlap by chance"] = chance / sum(int(ours[n].sum()) for n in ours)
    found["over magnitude"] = found["jackpot accuracy"] - found["magnitude accuracy"]
    found["third over random"] = (
        found["a third of the steps accuracy"] - found["random first accuracy"]
    )
    found["overlap over chance"] = found["overlap"] - found["overlap by chance"]
    found["restricted over unrestricted"] = (
        found["jackpot accuracy"] - found["unrestricted accuracy"]
    )
    return found


CLAIM = Claim(
    card="007",
    method="jackpots",
    title="an accurate sparse network lies in the trained one, near its magnitude mask",
    model="a trained ResNet-20, 90 % sparse, all but the classifier",
    data="CIFAR-10: 120 steps of 64 on 5,000 training images, 2,000 test images (full: 5 epochs "
    "of all, 10,000)",
    baseline="one-shot magnitude with the same densities; a random first mask; no restriction; "
    "batch norm re-estimated for every arm",
    metric="test accuracy, points; share of common kept weights",
    promises=(
        Promise("over magnitude", "the searched mask above the magnitude mask", margin=10.0),
        Promise(
            "third over random", "magnitude-first after a third of the steps above random-first"
        ),
        Promise(
            "overlap over chance", "final and magnitude masks share more than chance", margin=0.3
        ),
    ),
    measure=measure,
)
