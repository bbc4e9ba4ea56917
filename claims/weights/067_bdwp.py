"""N:M in both products against SR-STE, dense training and a random backward mask.

The backward masks are compared by the loss: on 3 seeds their accuracies were within the noise of
4,000 images, and the rounding of a right answer to 0 or 1 is the larger part of it. 20 seeds left
them open, so there are up to 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.diagnostics.small_images import fit_images, small_images, small_network
from sparseworks.diagnostics.subjects import loss_and_accuracy
from sparseworks.training.planning import Sparse
from sparseworks.weights.semistructured.bidirectional import mac_share

ARMS = {
    "sr-ste": ("sr-ste", {}),
    "bdwp": ("bdwp", {}),
    "random backward": ("bdwp", {"backward": "random"}),
    "nested": ("bdwp", {"backward": "nested"}),
}
QUICK = ("sr-ste", "bdwp", "random backward")


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    steps = 1000 if full else 120
    images, held = small_images(seed, 20_000 if full else 8_000)
    found: dict[str, float] = {}

    def fresh() -> torch.nn.Module:
        torch.manual_seed(seed)
        return small_network().to(memory_format=torch.channels_last)

    dense = fresh()
    fit_images(dense, images, steps=steps, seed=seed)
    found["dense loss"], found["dense"] = loss_and_accuracy(dense, held)
    for arm in ARMS if full else QUICK:
        method, options = ARMS[arm]
        model, shares = fresh(), []

        def look(step, run, arm=arm, shares=shares):
            if step == 1 and arm == "bdwp":
                shares.append(mac_share(run))

        sparse = Sparse(method, settings={"pattern": "2:8", **options})
        fit_images(model, images, steps=steps, seed=seed, sparse=sparse, after=look)
        found[f"{arm} loss"], found[arm] = loss_and_accuracy(model, held)
        if shares:
            found["multiplications"] = shares[0]
    found["half the multiplications"] = 1e-9 - abs(found["multiplications"] - 0.5)
    found["near sr-ste"] = 1.5 - (found["sr-ste"] - found["bdwp"])
    found["near dense"] = 4.0 - (found["dense"] - found["bdwp"])
    found["over random"] = found["random backward loss"] - found["bdwp loss"]
    return found


CLAIM = Claim(
    card="067",
    method="bdwp",
    title="2:8 in both products trains as well as in one, at half the multiplications",
    model="four convolutions of 16 to 128 channels from scratch; the first stays dense",
    data="CIFAR-10 at 16 x 16: 8,000 training images for 120 steps of 64, 4,000 test images (full: "
    "20,000 for 1,000)",
    baseline="SR-STE (backward product with the forward's weights), dense, a random backward mask",
    metric="test accuracy, points; test loss, nats; multiplications counted in the masks",
    promises=(
        Promise("near sr-ste", "within 1.5 points of SR-STE"),
        Promise("near dense", "within 4 points of dense training"),
        Promise("over random", "loss: choosing the backward mask by magnitude beats drawing it",
                negligible=0.02),
        Promise("half the multiplications", "half of dense training, counted", exact=True),
    ),
    measure=measure,
    looks=(*LOOKS, 20, 32),
    version=2,
)  # fmt: skip
