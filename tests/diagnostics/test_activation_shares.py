"""Shares that methods leave untouched, against a plain count of what each token reads."""

from __future__ import annotations

import pytest
import torch

from sparseworks.activations.calibrating import Job
from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.activation_shares import CountedActivations
from sparseworks.models.active import gates
from sparseworks.models.views import find_prunable

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    g = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(2, 97, (4, 32), generator=g)} for _ in range(2)]
    return Job(model, find_prunable(model), batches, 0.5)


def using(job, seed=2):
    ids = torch.randint(2, 97, (4, 32), generator=torch.Generator().manual_seed(seed))

    def use():
        with torch.no_grad():
            job.model(input_ids=ids)

    return use


def plainly(job, counted, run, use):
    """Percent untouched: a weight counts for a token where what it meets is not 0."""
    by_channel = counted.method in ("cats", "chess")
    touched = 0.0
    handles = []

    def note(outputs):
        def hook(module, args, output):
            nonlocal touched
            touched += float((args[0] != 0).flatten(0, -2).float().sum(1).mean()) * outputs

        return hook

    for view in job.views:
        module, last = view.module, view.module_name.rpartition(".")[2]
        outputs = module.out_features
        if by_channel and last == "up_proj":
            continue  # its rows: those of the channels that down_proj reads
        if by_channel and last == "down_proj":
            outputs += 64  # inputs of up_proj
        handles.append(module.register_forward_hook(note(outputs)))
    counted.measured(run, use)
    for handle in handles:
        handle.remove()
    return 100 * (1 - touched / sum(v.parameter.numel() for v in job.views))


@pytest.mark.parametrize(
    ("method", "options"),
    [("teal", {}), ("wina", {"select": "threshold"}), ("cats", {}), ("chess", {}),
     ("r-sparse", {"alpha": 1.0})],
)  # fmt: skip
@pytest.mark.parametrize("goal", [20, 35])
def test_the_share_is_reached_and_is_what_tokens_leave(job, method, options, goal):
    use = using(job)
    counted = CountedActivations(method, options, job)
    run, share = counted.reach(goal, use)
    assert abs(share - goal) <= 0.5
    assert share == pytest.approx(plainly(job, counted, run, use), abs=1e-4)
    assert not any(True for m in job.model.modules() for _ in gates(m))


def test_low_rank_parts_are_touched(job):
    counted = CountedActivations("r-sparse", {"alpha": 0.5}, job)
    run = counted.gates(0.4)
    share = counted.measured(run, using(job))
    columns = sum(x.share * x.weights for x in run.layers())
    rank = sum(g.down.numel() + g.up.numel() for g in run.gates.values())
    assert rank > 0
    assert share == pytest.approx(100 * (1 - (columns + rank) / counted.whole))


def test_rotations_count_once_for_layers_that_read_them_together(job):
    options = {"rotate": True, "select": "threshold"}
    plain, turned = (CountedActivations("wina", options, job, turns) for turns in (False, True))
    assert turned.turns == 2 * 2 * 64 * 64  # blocks, inputs of attention and of the MLP
    assert plain.most == 100
    run = turned.gates(0.6)
    turned.measured(run, using(job))
    assert plain.share(run) - turned.share(run) == pytest.approx(100 * turned.turns / turned.whole)
    assert abs(turned.reach(30, using(job))[1] - 30) <= 0.5


def test_goals_out_of_reach_are_refused(job):
    counted = CountedActivations("cats", {}, job)
    assert counted.most == pytest.approx(100 * 2 * 96 * 64 / (3 * 96 * 64 + 3 * 64 * 64))
    calls = []
    with pytest.raises(InvalidArgument, match="behind its gates"):
        counted.reach(60, lambda: calls.append(1))
    assert not calls
    with pytest.raises(InvalidArgument, match="choose another goal"):
        CountedActivations("teal", {}, job).reach(50, lambda: None)  # nothing runs: share 0
