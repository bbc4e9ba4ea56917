"""A learned 2:4 mask against one-shot masks, and a prior against none, on a byte decoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, trained_decoder
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.training.planning import Sparse
from sparseworks.weights.semistructured.maskllm import PatternChoice


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    full = setting == "full"
    steps = 500 if full else 150
    text = ByteText.novels(batch=16 if full else 8)
    base = trained_decoder(text)
    found = {"dense": text.loss(base)}
    generator = torch.Generator().manual_seed(1000 + seed)
    calibration = [text.windows(generator) for _ in range(16)]
    one_shot = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = copy.deepcopy(base)
        sw.prune(model, method, pattern="2:4", data=calibration)
        one_shot[method] = sw.masks(model)
        found[method] = text.loss(model)
    for arm, options in (("maskllm", {}), ("no prior", {"alpha": 0.0})):
        model = copy.deepcopy(base)
        sure: list[torch.Tensor] = []

        def look(step, job, sure=sure):
            if step == steps:
                parts = [job.part(n, PatternChoice) for n in job.views]
                sure += [torch.softmax(p.kappa * p.logits.detach(), 1).amax(1) for p in parts]

        sparse = Sparse("maskllm", settings={"pattern": "2:4", "strength": 0.0, **options})
        fit_bytes(model, text, steps=steps, lr=5e-3, seed=seed, sparse=sparse, after=look)
        found[arm] = text.loss(model)
        found[f"{arm} certainty"] = float(torch.cat(sure).mean())
        if arm == "maskllm":
            learned, first = sw.masks(model), one_shot["magnitude"]
            changed = sum(int((learned[n] ^ first[n]).sum()) for n in learned)
            found["changed"] = changed / sum(m.numel() for m in learned.values())
    gap = min(found["magnitude"], found["wanda"]) - found["dense"]
    found["half the gap"] = 0.5 * gap - (found["maskllm"] - found["dense"])
    found["over no prior"] = found["no prior"] - found["maskllm"]
    found["over sparsegpt"] = found["sparsegpt"] - found["maskllm"]
    found["masks move"] = found["changed"] - 0.05
    found["masks decide"] = found["maskllm certainty"] - 0.95
    return found


CLAIM = Claim(
    card="018",
    method="maskllm",
    title="a learned 2:4 mask beats one-shot masks, and a one-shot prior helps it",
    model="byte decoder of width 64 with 2 blocks, trained; its linear layers at 2:4",
    data="novels, another novel held out; 150 steps of 8 windows of 64 bytes (full: 500 of 16)",
    baseline="magnitude, Wanda and SparseGPT (which changes weights too); no prior",
    metric="held-out loss, nats a byte",
    promises=(
        Promise("half the gap", "gap to dense at most half of the best one-shot mask's"),
        Promise("over sparsegpt", "below SparseGPT, which updates its weights"),
        Promise("over no prior", "the magnitude prior lowers the loss"),
        Promise("masks move", "more than 5 % of the entries change"),
        Promise("masks decide", "mean largest probability above 0.95 at the end"),
    ),
    measure=measure,
)
