"""Dense models become mixtures: the same function, saved and read by transformers, undone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparseworks as sw
import tiny_models
from sparseworks.cli import main
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.experts.layers import mixtures
from sparseworks.experts.mlps import find_mlps
from sparseworks.models.zoo import ByteDecoder, FeedForward

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Llama", "Mixtral"), ("Mistral", "Mixtral"), ("Qwen3", "Qwen3Moe")],
)
def test_the_function_is_the_dense_one_here_and_in_transformers(kind, name, tmp_path):
    import transformers

    model = tiny_models.language_model(kind).double()
    before = logits(model)
    run = sw.upcycle(model, experts=4, top_k=2, seed=3)
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for layer in run.layers.values():  # as if trained
            layer.experts.down_proj.add_(0.05 * torch.randn_like(layer.experts.down_proj))
    moved = logits(model.float())  # the grouped product of transformers has no fp64
    made = run.to_transformers()
    assert type(made).__name__ == f"{name}ForCausalLM"
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(made)
    for found in (made, again):
        torch.testing.assert_close(logits(found), moved, rtol=1e-4, atol=1e-5)


def test_single_precision_keeps_it_to_1e5():
    model = tiny_models.language_model()
    before = logits(model)
    sw.upcycle(model, experts=8, top_k=2)
    assert float((logits(model) - before).abs().max()) < 1e-5 * float(before.abs().max())


def test_alternate_layers_are_a_mixture_of_qwen_and_none_of_mixtral(tmp_path):
    model = tiny_models.language_model("Qwen3")
    run = sw.upcycle(model, experts=2, top_k=1, layers="alternate")
    assert list(run.layers) == ["model.layers.0.mlp"]
    torch.testing.assert_close(logits(run.to_transformers()), logits(model), rtol=1e-4, atol=1e-5)
    llama = sw.upcycle(tiny_models.language_model(), layers="alternate")
    with pytest.raises(ModelError, match=r"\[1\] are dense"):
        llama.to_transformers()
    sw.save(llama.model, tmp_path / "m.safetensors")
    twin = sw.upcycle(tiny_models.language_model(), layers="alternate", seed=9)
    sw.load(tmp_path / "m.safetensors", twin.model)
    assert torch.equal(logits(twin.model), logits(llama.model))


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Phi"])
def test_mlps_of_other_families_are_read(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, n_embd=32, num_hidden_layers=2, n_layer=2,
        num_attention_heads=4, n_head=4, intermediate_size=48, ffn_dim=48, word_embed_proj_dim=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        config
    ).eval()
    if name == "OPT":  # its MLP is no module of its own
        with pytest.raises(ModelError, match="no MLP"):
            find_mlps(model)
        return
    before = logits(model)
    assert len(sw.upcycle(model, experts=4).layers) == 2
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_parts_of_an_mlp_add_up_to_it():
    for gated in (True, False):
        model = tiny_models.language_model() if gated else nn.Sequential(FeedForward(32, 48))
        mlp = find_mlps(model)[0]
        bank = mlp.split(4, torch.Generator())
        x = torch.randn(9, 32)
        from sparseworks.experts.routing import Routing

        ones = torch.ones(9, 4)
        y = bank(x, Routing(ones, ones > 0, ones, ones))
        torch.testing.assert_close(y, mlp.module(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="do not divide"):
        mlp.split(5, torch.Generator())


def test_training_lowers_the_loss_and_the_optimizer_is_checked():
    torch.manual_seed(0)
    model = ByteDecoder(32, 1, 2, 64, mlp=lambda: FeedForward(32, 48))
    early = torch.optim.AdamW(model.parameters(), 1e-2)
    run = sw.upcycle(model, experts=4, top_k=1)
    with pytest.raises(InvalidArgument, match="build it after"):
        run.attach(early)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run.attach(optimizer)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        out = model(IDS)
        loss = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert 0.01 <= run.penalty().item() < 0.1
        (loss + run.penalty()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert run.step == 10 and losses[-1] < losses[0]
    assert run.load()["blocks.0.mlp"].active == 1
    assert run.finish() is model and float(run.penalty()) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"top_k": 9}, InvalidArgument),
        ({"experts": 0}, InvalidArgument),
        ({"start": "zeros"}, InvalidArgument),
        ({"layers": "odd"}, InvalidArgument),
        ({"capacity": -1.0}, InvalidArgument),
        ({"steps": 0}, InvalidArgument),
        ({"include": "*.mpl"}, InvalidArgument),
        ({"method": "wanda"}, InvalidArgument),
    ],
)
def test_bad_options_change_nothing(options, error):
    model = tiny_models.language_model()
    with pytest.raises(error):
        sw.upcycle(model, **options)
    assert not list(mixtures(model))


def test_bad_models_are_refused():
    with pytest.raises(ModelError, match="no MLP"):
        sw.upcycle(tiny_models.net())
    model = tiny_models.language_model()
    sw.upcycle(model)
    with pytest.raises(ModelError, match="already"):
        sw.upcycle(model)
    broken = tiny_models.language_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp holds NaN"):
        sw.upcycle(broken, include="model.layers.1.mlp")
    pruned = tiny_models.language_model()
    sw.prune(pruned, "magnitude", sparsity=0.5)
    with pytest.raises(ModelError, match="mask record"):
        sw.upcycle(pruned)


def test_the_command_trains_and_writes_a_model_that_transformers_loads(tmp_path, capsys):
    import transformers

    words = [f"{tiny_models.__file__}:language_model", "--experts", "4", "--top-k", "1",
             "--data", f"{tiny_models.__file__}:texts", "--steps", "3", "--lr", "1e-3"]  # fmt: skip
    assert main(["upcycle", *words, "--out", str(tmp_path / "o")]) == 0
    assert "parameters" in capsys.readouterr().out
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["parameters"][1] > result["parameters"][0] and result["checkpoint"]
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "checkpoint")
    assert made.config.num_local_experts == 4 and made.config.num_experts_per_tok == 1
    assert main(["upcycle", *words[:1], "--steps", "3"]) == 1
    assert "--data" in capsys.readouterr().err
