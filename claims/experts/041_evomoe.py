"""EvoMoE against a dense MLP, Switch, and its gate from scratch, on a byte decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseworks.diagnostics.byte_decoder import ByteText
from sparseworks.diagnostics.byte_mixtures import ByteMixture
from sparseworks.diagnostics.claims import Claim, Promise, Setting

EXPERTS, WIDTH, HIDDEN, LAYERS = 8, 64, 96, 2
DENSE, ANNEAL = 0.2, 0.5  # shares of all steps: one MLP; then the temperature falls
REST = 4 * WIDTH**2 + 256 * WIDTH / LAYERS  # multiplications of a token and layer outside MLPs
SWITCH = {"top_k": 1, "renormalize": False, "start": "fresh", "experts": EXPERTS}


def _cost(active: float) -> float:
    """Multiplications of a token in a layer."""
    return REST + 2 * WIDTH * HIDDEN * active


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 2500 if setting == "full" else 300
    text = ByteText.novels(held=16_384, batch=16 if setting == "full" else 8)
    setup = ByteMixture(text, WIDTH, LAYERS, HIDDEN)
    found = {"dense": text.loss(setup.fit(setup.dense(seed), steps=steps, seed=seed))}

    def trained(name: str, run: Any, own: int, after: Any = None) -> None:
        found[name] = text.loss(setup.fit(run, steps=own, seed=seed, after=after))

    trained("switch", setup.mixture("upcycling", seed, steps=steps, **SWITCH), steps)
    begun = round(DENSE * steps)
    rest = steps - begun
    given = {"anneal": ANNEAL / (1 - DENSE), "hard": ANNEAL / (1 - DENSE), "experts": EXPERTS}
    base = setup.dense(seed)
    setup.fit(base, steps=begun, seed=seed + 1000, final=1.0)
    counts: list[float] = []

    def gated(name: str, run: Any, own: int) -> float:
        counts.clear()
        run.reset()

        def after(step: int) -> None:
            loads = run.load().values()
            counts.append(sum(x.active for x in loads) / len(loads))
            run.reset()

        trained(name, run, own, after)
        return sum(counts) / len(counts)

    spent = gated("evomoe", setup.mixture("evomoe", seed, steps=rest, model=base, **given), rest)
    tenth, cut = rest // 10, round(given["hard"] * rest)
    found["active at the start"] = sum(counts[:tenth]) / tenth
    found["active before the switch"] = sum(counts[cut - tenth : cut - 1]) / (tenth - 1)
    found["active at the end"] = counts[-1]
    run = setup.mixture("evomoe", seed, steps=steps, start="fresh",
                        **{**given, "anneal": DENSE + ANNEAL, "hard": DENSE + ANNEAL})  # fmt: skip
    gated("from scratch", run, steps)
    cost = (begun * _cost(1) + rest * _cost(spent)) / _cost(1)
    longer = setup.mixture("upcycling", seed, steps=round(cost), **SWITCH)
    trained("switch, equal cost", longer, round(cost))
    found["steps of equal cost"] = cost
    found["experts pay"] = found["dense"] - found["switch"]
    found["spawning helps"] = found["from scratch"] - found["evomoe"]
    found["over switch"] = found["switch"] - found["evomoe"]
    found["over switch, equal cost"] = found["switch, equal cost"] - found["evomoe"]
    found["starts dense"] = found["active at the start"] - 0.9 * EXPERTS
    found["ends sparse"] = 2 - found["active before the switch"]
    return found


CLAIM = Claim(
    card="041",
    method="evomoe",
    title="experts spawned from a trained MLP under a gate from dense to sparse",
    model=f"byte decoder of width {WIDTH} with 2 blocks, {EXPERTS} experts of width {HIDDEN}; "
    "evaluated with one expert a token, without noise",
    data="novels, another novel held out; 300 steps of 8 windows of 64 bytes (full: 2,500 of 16), "
    "a fifth of them with one MLP, half with a falling temperature",
    baseline="one MLP; Switch top-1 at equal steps and at equal multiplications; the gate with "
    "fresh experts from the first step",
    metric="held-out loss, nats a byte; experts a token used",
    promises=(
        Promise("experts pay", "Switch below one MLP, else there is nothing to win"),
        Promise("spawning helps", "EvoMoE below its gate with fresh experts"),
        Promise("over switch", "EvoMoE below Switch at equal steps"),
        Promise("over switch, equal cost", "EvoMoE below Switch at equal multiplications"),
        Promise("starts dense", "at first at least 0.9 of the experts are active"),
        Promise("ends sparse", "at most 2 are before the switch to one"),
    ),
    measure=measure,
)
