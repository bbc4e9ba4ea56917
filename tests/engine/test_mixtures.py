"""Mixtures of experts of transformers: what is around the experts runs in programs."""

from __future__ import annotations

import pytest
import torch

import sparseworks as sw
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


def mixture(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.2)
        if p.ndim > 1 and "embed" not in name and "gate.weight" not in name:
            p.data *= torch.rand(p.shape) > 0.6
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
