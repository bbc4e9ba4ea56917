"""Every family slims, runs, saves and loads again."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from slim_families import DiT, UNet, diffusion_batch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.models.calls import call
from sparseworks.weights.structured import SlimResult, load_slim, save_slim

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "coupling"))
logging.getLogger("transformers").setLevel(logging.ERROR)
UNIFORM = ["bert", "vit", "gpt2", "opt", "llama", "gemma3", "qwen2", "mixtral", "t5", "swin"]
HF = [*UNIFORM, "convnext", "gpt_oss"]


def make(name: str) -> tuple[nn.Module, object]:
    pytest.importorskip("transformers")
    import families

    if name == "qwen2":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        )
        return Qwen2ForCausalLM(config).eval(), families._ids()[0]
    model, batches = families.make(name)
    return model, batches[0]


def slim(*given: Any, **options: Any) -> SlimResult:
    """Slimmed in time: it traces at least twice, and no family may take half a minute."""
    start = time.process_time()
    result = sw.slim(*given, **options)
    assert time.process_time() - start < 30
    return result


@torch.no_grad()
def output(model: nn.Module, batch: object) -> Tensor:
    out = call(model, batch)
    out = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return out if out is not None else call(model, batch)[0]


@pytest.mark.parametrize("name", UNIFORM)
def test_plain_from_pretrained_loads_a_uniform_result(name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    result = slim(model, batch, flops=0.8, floor=0.05)
    assert result.flops[1] <= 0.8 * result.flops[0]
    assert result.parameters[1] < result.parameters[0] and result.config
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, batch), output(model, batch))
    widths = {}
    for width in result.widths:
        ratio = width.after / width.before
        key = "".join(c for c in width.name if not c.isdigit())
        assert widths.setdefault(key, ratio) == ratio, "equal layers keep equal shares"


@pytest.mark.parametrize("name", HF)
def test_widths_per_layer_load_through_their_record(name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    result = slim(model, batch, flops=0.7, uniform=False, streams=True)
    assert result.flops[1] <= 0.7 * result.flops[0]
    save_slim(result, tmp_path / "slim")
    again = load_slim(tmp_path / "slim")
    assert torch.equal(output(again, batch), output(model, batch))


@pytest.mark.parametrize("factory", [UNet, DiT])
def test_diffusion_models(factory: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = factory().eval(), diffusion_batch()
    result = slim(model, batch, flops=0.6)
    assert result.flops[1] <= 0.6 * result.flops[0]
    save_slim(result, tmp_path / "slim")
    again = load_slim(tmp_path / "slim", factory())
    assert torch.equal(output(again, batch), output(model, batch))


@pytest.mark.parametrize("kind", ["scales", "branches", "dual", "heads"])
def test_models_that_hold_the_sizes_of_their_tensors(kind: str, tmp_path: Path) -> None:
    from held import Between

    model, images = Between(kind), torch.randn(2, 3, 6, 6)
    result = slim(model, images, flops=0.6)
    assert result.flops[1] <= 0.6 * result.flops[0]
    assert any(c.module == "block" for c in result.changes)
    save_slim(result, tmp_path / "slim")
    again = load_slim(tmp_path / "slim", Between(kind))
    assert torch.equal(output(again, images), output(model, images))


def test_whole_key_value_groups_go_and_the_config_says_so() -> None:
    model, batch = make("llama")
    result = sw.slim(model, batch, params=0.9, include="*.self_attn.*", floor=0.0)
    assert result.config == {"num_attention_heads": 2, "num_key_value_heads": 1}
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16, 32) and attention.k_proj.weight.shape == (8, 32)


def test_the_config_stays_when_the_call_fails() -> None:
    model, batch = make("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    fields = model.config.to_dict()
    with pytest.raises(sw.SparseworksError, match="cannot fall"):
        sw.slim(model, batch, flops=0.01)
    assert model.config.to_dict() == fields
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Joined(nn.Module):
    """A part of the inputs passes by, as in rotations of a part of a head; here it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        return self.down(torch.cat([y, x[:, 8:]], 1))


def test_a_joined_part_may_be_empty() -> None:
    torch.manual_seed(0)
    done = slim(Joined(), torch.randn(2, 8), flops=0.5, include="up.weight")
    assert done.parameters[1] < done.parameters[0] and done.model.up.out_features == 8


def test_a_config_that_refuses_a_number_describes_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MptConfig(
        vocab_size=64, d_model=32, n_layers=1, n_heads=4, use_cache=False
    )
    model = transformers.MptForCausalLM(config).eval()
    given = {"input_ids": torch.arange(6)[None]}
    with pytest.raises(sw.SparseworksError, match="uniform=False"):
        slim(model, given, flops=0.72, copy=True)
    done = slim(model, given, flops=0.72, uniform=False)
    assert done.flops[1] <= 0.72 * done.flops[0]
