"""Mixtures of experts of transformers: what is around the experts runs in programs."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseworks as sw
from sparseworks.engine.experts import Experts, with_experts
from sparseworks.engine.steps import Call, Ref
from sparseworks.kernels.native import available

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "num_experts_per_tok": 2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
}  # fmt: skip


def mixture(family, zeros=0.4):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.2)
        if p.ndim > 1 and "embed" not in name and "gate.weight" not in name:
            p.data *= torch.rand(p.shape) > zeros
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_run_in_programs(family, program_wins, tmp_path):
    model = mixture(family)
    ids = torch.randint(3, 50, (2, 19))
    compiled = sw.compile(model, {"input_ids": ids})
    assert compiled.kind == "program", compiled.notes
    compiled.save(tmp_path / "plan")
    loaded = sw.load_compiled(tmp_path / "plan")
    for prompt in (ids, torch.randint(3, 50, (1, 40)), torch.randint(3, 50, (3, 7))):
        with torch.no_grad():
            wanted = model(input_ids=prompt).logits
        for run in (compiled, loaded):
            found = run(input_ids=prompt).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    taken = {op.name for part in compiled.plan.parts for op in part.ops if hasattr(op, "name")}
    assert {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} <= taken
    assert "aten._grouped_mm.default" in compiled.explain()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_skip_their_zeros(family, program_wins, tmp_path):
    model = mixture(family, zeros=0.8)
    banks = [n for n, _ in model.named_parameters() if ".experts." in n]
    ids = torch.randint(3, 50, (2, 19))
    compiled = sw.compile(model, {"input_ids": ids})
    compiled.save(tmp_path / "plan")
    for run in (
        compiled,
        sw.load_compiled(tmp_path / "plan"),
        pickle.loads(pickle.dumps(compiled)),
    ):
        for prompt in (ids, torch.randint(3, 50, (1, 1)), torch.randint(3, 50, (5, 170))):
            with torch.no_grad():
                wanted = model(input_ids=prompt).logits
            found = run(input_ids=prompt).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    said = compiled.explain()
    assert len(banks) == 4 and not set(banks) & set(compiled.skipped)
    assert all(f"experts {n}: 4x" in said for n in banks) and "_grouped_mm" not in said


@pytest.mark.parametrize("turned", [False, True])
@given(st.lists(st.integers(0, 40), min_size=5, max_size=5), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_rows_of_any_number_by_expert(turned, counts, beyond):
    torch.manual_seed(0)
    bank = torch.randn(5, 12, 8) * (torch.rand(5, 12, 8) > 0.7)
    rows = torch.randn(sum(counts) + beyond, 8)
    ends = torch.tensor(counts).cumsum(0).int()
    call = Call("y", "aten._grouped_mm.default", [Ref("x"), Ref("w"), Ref("ends")], {})
    turn = Call("w", "aten.transpose.int", [Ref("bank"), 1, 2], {})
    constants = {"bank": bank} if turned else {"w": bank.transpose(1, 2).contiguous()}
    *_, experts = with_experts([turn, call] if turned else [call], constants, 2)
    assert isinstance(experts, Experts)
    found = experts({"x": rows, "ends": ends})
    owner = torch.arange(5).repeat_interleave(torch.tensor(counts))
    wanted = torch.einsum("noi,ni->no", bank[owner].double(), rows[: len(owner)].double())
    torch.testing.assert_close(found[: len(owner)], wanted.float(), rtol=1e-5, atol=1e-5)
    assert not found[len(owner) :].any()


def test_banks_with_few_zeros_are_left_to_torch():
    call = Call("y", "aten._grouped_mm.default", [Ref("x"), Ref("w"), Ref("ends")], {})
    assert with_experts([call], {"w": torch.randn(4, 6, 8)}, 1) == [call]
