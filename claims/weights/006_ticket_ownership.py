"""A code in the empty kernels of a ticket, what it costs and survives; and kernels as a key.

The enabled positions need weights like the others, so the ticket is rewound to its initialisation
and trained from there, as in the paper, and not fine-tuned from trained weights.

Up to 20 seeds, because 8 left the key open; less than a quarter of a point is no effect of it.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.subjects import image_subject, loss_and_accuracy, trained_resnet
from sparseworks.models.zoo import CifarResNet
from sparseworks.training.fitting import Recipe, fit_classifier
from sparseworks.weights.tickets.signatures import Code, Place, embed, verify

OWNER, SPARSITY = "the owner, 2026", 0.8
READABLE = 0.04  # scattered bit errors that a QR code of level H still corrects


def _prune(model: nn.Module, sparsity: float) -> sw.Masks:
    return sw.prune(
        model, "magnitude", sparsity=sparsity, budget="global", include="*", exclude="conv1.*"
    ).masks


def _rate(model: nn.Module, code: Code, place: Place) -> float:
    return verify({n: p.detach() for n, p in model.named_parameters()}, code, place).error_rate


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    held: Callable[[nn.Module], float]
    if full:
        train, held = image_subject(seed, 20_000)
        recipe = Recipe(epochs=15)
    else:
        _, train, test = trained_resnet(seed, setting)
        recipe = Recipe(epochs=8, batch_size=50, augment=False)

        def held(model: nn.Module) -> float:
            return loss_and_accuracy(model, test)[1]

    def fit(model: nn.Module, *, start: object, seed: int, first_step: int) -> None:
        fit_classifier(model, train, recipe, start=start, seed=seed)

    torch.manual_seed(seed)
    initial = CifarResNet(3 if full else 1).to(memory_format=torch.channels_last)
    dense = copy.deepcopy(initial)
    fit_classifier(dense, train, recipe, seed=seed)
    found = {"dense accuracy": held(dense)}
    ticket = _prune(dense, SPARSITY)
    code = Code.of_text(OWNER)
    written = embed(ticket, code, seed=seed)
    model = copy.deepcopy(initial)
    with tempfile.TemporaryDirectory() as folder:  # shared: the whole ticket is trained once
        common = {
            "owner": OWNER, "ticket": ticket, "controls": True, "seed": seed, "evaluate": held,
            "folder": folder, "about": {"claim": "006"},
        }  # fmt: skip
        coded = sw.experiment(fit, model, "ownership", **common)
        keyed = sw.experiment(
            fit, copy.deepcopy(initial), "ownership", scheme="key", walks=1000, **common
        )
    scores = {n: r.figures["score"] for done in (coded, keyed) for n, r in done.finished.items()}
    found |= {f"{name} accuracy": score for name, score in scores.items()}
    found |= {
        "share of mask bits changed": written.changed / sum(m.numel() for m in ticket.values()),
        "share of weights withheld": keyed.figures["share of weights withheld"],
        "error rate when written": _rate_of_masks(written.masks, code, written.place),
        "error rate after training": _rate(model, code, written.place),
        "error rate of the unmarked ticket": _rate_of_masks(ticket, code, written.place),
        "error rate of other owners' codes": statistics.fmean(
            _rate(model, Code.of_text(f"somebody {i}"), written.place) for i in range(20)
        ),
    }
    for share in (0.05, 0.1, 0.2):  # a thief prunes this part of what remains
        attacked = copy.deepcopy(model)
        _prune(attacked, 1 - (1 - SPARSITY) * (1 - share))
        found[f"error rate, {share:.0%} more pruned"] = _rate(attacked, code, written.place)

    worst = max(found["error rate when written"], found["error rate after training"])
    found["written exactly"] = 1e-9 - worst
    found["costs little"] = 0.5 + scores["marked"] - scores["unmarked"]
    found["survives pruning"] = READABLE - found["error rate, 10% more pruned"]
    found["noise elsewhere"] = found["error rate of the unmarked ticket"] - 0.25
    found["key over random"] = scores["without random kernels"] - scores["released"]
    return found


def _rate_of_masks(record: sw.Masks, code: Code, place: Place) -> float:
    return verify(dict(record), code, place).error_rate


CLAIM = Claim(
    card="006",
    method="ownership",
    title="a code in the zeros stays readable and costs nothing; withheld kernels cost accuracy",
    model="ResNet-8 (full: 20): trained, 80 % of the weights masked by global magnitude (not the "
    "first convolution), rewound to the initialisation and trained again",
    data="scikit-learn's digits as RGB images: 1,000 to train for 8 epochs, 797 to test (full: "
    "20,000 images of CIFAR-10 for 15)",
    baseline="the ticket without a code; as many random kernels of the same sizes withheld",
    metric="bit error rate; test accuracy, points",
    promises=(
        Promise("written exactly", "no bit differs when written nor after training", exact=True),
        Promise("costs little", "marked within 0.5 points of unmarked"),
        Promise("survives pruning", "at most 4 % of the bits differ after pruning 10 % more"),
        Promise("noise elsewhere", "more than 25 % of the bits differ in the unmarked ticket"),
        Promise("key over random", "without the key, below without random kernels", margin=1.0,
                negligible=0.25),
    ),
    measure=measure,
    looks=(*LOOKS, 20),
    version=2,
)  # fmt: skip
