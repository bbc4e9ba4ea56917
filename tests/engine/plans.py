"""Plans of sparse models, checked against the models, for tests of what the rules take in."""

import torch

from sparseworks.engine.graph import capture
from sparseworks.engine.plan import make_plan


def planned(model, *inputs, **kwargs):
    """A plan that computes what the model does at half its weights, also for one entry."""
    for p in model.parameters():
        if p.ndim > 1:
            p.data *= torch.rand(p.shape) < 0.5
    model = model.eval()
    plan = make_plan(capture(model, inputs, kwargs), 2)
    assert plan is not None
    with torch.no_grad():
        for count in (None, 1):
            given, more = [x[:count] for x in inputs], {k: x[:count] for k, x in kwargs.items()}
            torch.testing.assert_close(
                plan(*given, **more), model(*given, **more), rtol=1e-4, atol=1e-5
            )
    return plan


def calls(plan):
    """What torch runs."""
    return [s.target for s in plan.steps if s not in plan.parts]


def products(plan):
    """Names of the weights that programs multiply by."""
    return [op.name for part in plan.parts for op in part.ops if getattr(op, "name", "")]
