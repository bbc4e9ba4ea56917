"""AST and its side branch against fixed masks and SR-STE, retraining a byte decoder at 1:4."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import sparseworks as sw
from sparseworks.diagnostics.byte_decoder import ByteText, fit_bytes, trained_decoder
from sparseworks.diagnostics.claims import Claim, Promise, Setting
from sparseworks.training.distilling import Distillation
from sparseworks.training.planning import Sparse
from sparseworks.training.watching import Trace
from sparseworks.weights.semistructured.adaptive import AST

PATTERN, DECAY, LR = "1:4", 1e-2, 2e-3
ARMS = {
    "fixed": ("fixed", {}, False, LR),
    "fixed distilled": ("fixed", {}, True, LR),
    "sr-ste": ("sr-ste", {"decay": DECAY}, False, 1e-3),
    "ast": ("ast", {"decay": DECAY}, False, LR),
    "ast distilled": ("ast", {"decay": DECAY}, True, LR),
    "ast branch": ("slorb", {"decay": DECAY, "block": 16}, True, LR),
}


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 420 if setting == "full" else 100
    text = ByteText.novels(batch=16 if setting == "full" else 8)
    base = trained_decoder(text)
    found = {"before": text.loss(base)}
    dense = copy.deepcopy(base)
    fit_bytes(dense, text, steps=steps, lr=LR, seed=seed)
    found["dense"] = text.loss(dense)
    for arm, (method, options, distilled, lr) in ARMS.items():
        model = copy.deepcopy(base)
        if method == "fixed":
            sw.prune(model, "magnitude", pattern=PATTERN)
            sparse = Sparse(method)
        else:
            sparse = Sparse(method, settings={"pattern": PATTERN, **options})
        loss = {"loss": Distillation.of(AST.recovery, base)} if distilled else {}
        traces: list[Trace] = []

        def look(step, run, traces=traces):
            if not traces:
                traces.append(Trace(run, 10))  # of the masks after the first step
            traces[0].look(step)

        fit_bytes(model, text, steps=steps, lr=lr, seed=seed, sparse=sparse, after=look, **loss)
        found[arm] = text.loss(model)
        if arm == "ast distilled":
            flips = [row["flips"] for row in traces[0].rows]
            tenth = max(1, len(flips) // 5)
            found["early flips"] = sum(flips[1 : 1 + tenth]) / tenth
            found["late flips"] = sum(flips[-tenth:]) / tenth
            found["moved"] = traces[0].rows[-1]["moved"]
    found["ast over sr-ste"] = found["sr-ste"] - found["ast"]
    found["distilled over ast"] = found["ast"] - found["ast distilled"]
    found["distilled over fixed"] = found["fixed"] - found["ast distilled"]
    found["branch over distilled"] = found["ast distilled"] - found["ast branch"]
    found["moving over fixed, both distilled"] = found["fixed distilled"] - found["ast distilled"]
    found["masks settle"] = found["early flips"] / 10 - found["late flips"]
    return found


CLAIM = Claim(
    card="043",
    method="ast",
    title="a decay inside Adam, distillation and a side branch each help a moving 1:4 mask",
    model="byte decoder of width 64 with 2 blocks, trained; its linear layers retrained at 1:4",
    data="novels, another novel held out; 100 steps of 8 windows of 64 bytes (full: 420 of 16)",
    baseline="fixed magnitude mask, SR-STE in Adam, each arm without its part; dense with the same "
    "steps is recorded",
    metric="held-out loss, nats a byte",
    promises=(
        Promise("ast over sr-ste", "AST below SR-STE in Adam, cross-entropy alone"),
        Promise("distilled over ast", "distillation lowers AST's loss"),
        Promise("distilled over fixed", "AST distilled below a fixed mask without a teacher"),
        Promise("branch over distilled", "the side branch lowers the loss", margin=0.01),
        Promise("moving over fixed, both distilled", "moving below fixed masks, both distilled"),
        Promise("masks settle", "late flip rate below a tenth of the early one"),
    ),
    measure=measure,
)
