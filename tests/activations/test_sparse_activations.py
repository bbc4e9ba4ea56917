"""Gates on activations: rules against loops, realised shares, undoing, files, the decoder."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.activations.calibrating import Reader, quantile
from sparseworks.activations.chess import OutputGate
from sparseworks.activations.r_sparse import LowRankGate, RSparse
from sparseworks.activations.sparsing_law import Layer
from sparseworks.core.errors import CheckpointError, DataError, InvalidArgument, ModelError
from sparseworks.models.active import ActiveInputs, InputGate, gates

transformers = pytest.importorskip("transformers")
METHODS = ["teal", "wina", "r-sparse", "cats", "chess", "sparsing-law"]


def llama(**changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
    }  # fmt: skip
    config = transformers.LlamaConfig(**(options | changes))
    return transformers.LlamaForCausalLM(config).eval()


def texts(seed=0, count=2, length=24):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, 97, (2, length), generator=g)} for _ in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def reader(rows=12, columns=20, tokens=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Reader(
        ("x",), torch.randn(rows, columns, generator=g), torch.randn(tokens, columns, generator=g)
    )


@pytest.mark.parametrize("method", METHODS)
def test_removed_saved_and_loaded(method, tmp_path):
    model, batch = llama(), texts(1)[0]
    dense = logits(model, batch)
    run = sw.sparse_activations(model, method, sparsity=0.5, data=texts())
    sparse = logits(model, batch)
    assert not torch.equal(sparse, dense)
    run.save(tmp_path / "gates.safetensors")
    with run.off():
        assert torch.equal(logits(model, batch), dense)
    assert torch.equal(logits(model, batch), sparse)
    run.remove()
    assert torch.equal(logits(model, batch), dense)
    assert not any(True for m in model.modules() for _ in gates(m))
    again = sw.load_activations(tmp_path / "gates.safetensors", model)
    assert torch.equal(logits(model, batch), sparse)
    assert (again.method, again.options) == (run.method, run.options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_what_is_let_through_is_what_was_asked_for(method, sparsity):
    model, data = llama(), texts(count=4)
    run = sw.sparse_activations(model, method, sparsity=sparsity, data=data)
    run.reset()
    for batch in data:
        logits(model, batch)
    shares = [x.share for x in run.layers()]
    if method in ("teal", "wina", "cats"):
        # later layers see inputs that the gates before them changed
        assert all(abs(s - (1 - sparsity)) < 0.12 for s in shares)
    assert abs(sum(shares) / len(shares) - (1 - sparsity)) < 0.12 or method == "r-sparse"
    if method == "r-sparse":  # both parts count
        assert run.density <= (1 - sparsity) * 1.1


def test_no_sparsity_is_the_dense_model():
    model, batch = llama(), texts(1)[0]
    dense = logits(model, batch)
    for method in ("teal", "wina", "cats", "chess"):
        run = sw.sparse_activations(model, method, sparsity=0.0, data=texts())
        assert torch.equal(logits(model, batch), dense), method
        run.remove()


@pytest.mark.parametrize("keep", [1, 3, 7, 20])
def test_top_k_is_a_loop_over_tokens(keep):
    g = torch.Generator().manual_seed(keep)
    x = torch.randint(-3, 4, (5, 20), generator=g).float()  # with ties
    weight = torch.randint(0, 3, (20,), generator=g).float()
    mask = ActiveInputs(keep=keep, weight=weight).mask(x)
    for row, found in zip(x.tolist(), mask.tolist(), strict=True):
        order = sorted(range(20), key=lambda i: (-abs(row[i]) * float(weight[i]), i))
        assert [i for i in range(20) if found[i]] == sorted(order[:keep])


def test_wina_is_the_best_subset_for_orthogonal_columns():
    """Against all subsets; magnitude alone is worse where column norms differ."""
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(16, 8, generator=g, dtype=torch.float64))
    weight = (q * torch.exp(torch.randn(8, generator=g, dtype=torch.float64))).float()
    layer = nn.Linear(8, 16, bias=False)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    data = torch.randn(30, 8, generator=g)
    total = {"wina": 0.0, "teal": 0.0, "best": 0.0}
    for x in data:
        for method in ("wina", "teal"):
            run = sw.sparse_activations(
                model, method, sparsity=0.5, data=[x[None]], select="top-k", include="0"
            )
            total[method] += float((model(x[None]).detach() - weight @ x).norm())
            run.remove()
        total["best"] += min(
            float((weight[:, list(drop)] @ x[list(drop)]).norm())
            for drop in itertools.combinations(range(8), 4)
        )
    assert total["wina"] == pytest.approx(total["best"], rel=1e-5)
    assert total["teal"] > total["best"] * 1.05


def test_rotation_makes_columns_orthogonal_and_changes_nothing_without_sparsity():
    from sparseworks.activations.calibrating import Job
    from sparseworks.activations.rotation import rotations
    from sparseworks.models.views import find_prunable

    model, batch = llama(), texts(1)[0]
    dense = logits(model, batch)
    turns = rotations(Job(model, list(find_prunable(model)), texts(), 0.0))
    leaders = {t.leader for t in turns.values()}
    assert leaders == {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.k_proj", "mlp.gate_proj")
    }
    for name in leaders:
        weight = model.get_submodule(name).weight.detach()
        turned = weight @ turns[name].matrix
        gram = turned.T @ turned
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-5)
        values = torch.linalg.svdvals(weight)
        assert torch.allclose(turned.norm(dim=0)[: len(values)], values, atol=1e-5)
    run = sw.sparse_activations(model, "wina", sparsity=0.0, data=texts(), rotate=True)
    assert torch.allclose(logits(model, batch), dense, atol=1e-4)
    run.remove()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.9, 1.0])
def test_r_sparse_is_a_loop_over_tokens_and_channels(alpha):
    r, sparsity = reader(), 0.4
    gate = RSparse(alpha).family(r)(sparsity)
    layer = nn.Linear(20, 12)
    layer.weight.data = r.weight
    handles = gate.attach(layer)
    found = layer(r.inputs).detach()
    for h in handles:
        h.remove()
    w, x = r.weight.double(), r.inputs.double()
    norms = w.norm(dim=0)
    scores = sorted((x.abs() * norms).flatten().tolist())
    share = (1 - sparsity) * alpha
    tau = scores[round((1 - share) * len(scores)) - 1]
    rank = max(1, int((12 * 20 * (1 - sparsity) - int(20 * share + 1e-9) * 12) / 32 + 1e-9))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ v[:rank]
    for t in range(50):
        y = layer.bias.detach().double().clone()
        for i in range(20):
            big = abs(x[t, i]) * norms[i] > tau * (1 + 1e-6)
            y += (w if big or alpha == 1 else low)[:, i] * x[t, i] * (big or alpha < 1)
        assert torch.allclose(found[t].double(), y, atol=1e-4)


def test_r_sparse_with_full_rank_is_the_layer():
    r = reader()
    u, s, v = torch.linalg.svd(r.weight, full_matrices=False)
    layer = nn.Linear(20, 12)
    layer.weight.data = r.weight
    wanted = layer(r.inputs)
    LowRankGate(ActiveInputs(threshold=0.7), v, u * s).attach(layer)
    assert torch.allclose(layer(r.inputs), wanted, atol=1e-5)


def test_chess_thresholds_are_those_of_a_loop_and_cats_is_its_special_case():
    model, data = llama(), texts()
    g_seen, u_seen = [], []
    mlp = model.model.layers[0].mlp
    hooks = [
        mlp.act_fn.register_forward_hook(lambda m, a, o: g_seen.append(o.abs().flatten(0, 1))),
        mlp.up_proj.register_forward_hook(lambda m, a, o: u_seen.append(o.abs().flatten(0, 1))),
    ]
    for batch in data:
        logits(model, batch)
    for hook in hooks:
        hook.remove()
    g, u = torch.cat(g_seen).double(), torch.cat(u_seen).double()
    mean = [sum(float(v) for v in u[:, i]) / len(u) for i in range(96)]
    scores = sorted(float(g[t, i]) * mean[i] for t in range(len(g)) for i in range(96))
    limit = scores[round(0.6 * len(scores)) - 1]
    run = sw.sparse_activations(model, "chess", sparsity=0.6, data=data)
    gate = run.gates["model.layers.0.mlp.act_fn"]
    assert isinstance(gate, OutputGate)
    wanted = torch.tensor([limit / m for m in mean])
    assert torch.allclose(gate.tau, wanted, rtol=1e-4)
    read = {n.rpartition(".")[2] for n in run.gates}
    assert read == {"act_fn", "q_proj", "o_proj"}  # keys and values read all
    run.remove()
    with torch.no_grad():  # |u| alike everywhere
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
    same = [
        sw.sparse_activations(model, m, sparsity=0.5, data=data, **o)
        for m, o in (("chess", {"attention": False}),)
    ]
    taus = [r.gates["model.layers.0.mlp.act_fn"].tau for r in same]
    same[0].remove()
    cats = sw.sparse_activations(model, "cats", sparsity=0.5, data=data)
    assert torch.allclose(taus[0], cats.gates["model.layers.0.mlp.act_fn"].tau, rtol=1e-5)


def test_a_gated_mlp_needs_only_what_survives():
    """Rows of up and columns of down that the gate lets through: the same result."""
    model, data = llama(), texts()
    run = sw.sparse_activations(model, "chess", sparsity=0.6, data=data, attention=False)
    mlp = model.model.layers[1].mlp
    x = torch.randn(64)
    wanted = mlp(x[None, None])[0, 0]
    tau = run.gates["model.layers.1.mlp.act_fn"].tau
    g = nn.functional.silu(mlp.gate_proj.weight @ x)
    live = (g.abs() >= tau).nonzero()[:, 0]
    assert 0 < len(live) < 96
    u = mlp.up_proj.weight[live] @ x
    assert torch.allclose(mlp.down_proj.weight[:, live] @ (g[live] * u), wanted, atol=1e-6)


def test_cett_is_its_definition():
    r = reader(rows=9, columns=30, tokens=17)
    layer = Layer(r)
    x, w = r.inputs.double(), r.weight.double()
    sizes = x.abs() * w.norm(dim=0)
    for c in (0.05, 0.2, 0.5):
        t = layer.largest(c)

        def error(limit):
            total = 0.0
            for i in range(17):
                tail = sum(
                    (x[i, j] * w[:, j] for j in range(30) if sizes[i, j] <= limit),
                    torch.zeros(9, dtype=torch.float64),
                )
                total += float(tail.norm() / (w @ x[i]).norm())
            return total / 17

        assert error(t) <= c + 1e-6
        step = (layer.threshold(1) - layer.threshold(0)) * 1.01
        assert error(t + step) > c or t + step > float(sizes.quantile(0.99))
        rule = layer.rule(c)
        assert torch.equal(rule.mask(r.inputs), sizes.float() > t)


def test_perplexity_meets_its_budget():
    from sparseworks.models.calls import default_loss

    model, data = llama(), texts(count=3)
    with torch.no_grad():
        dense = sum(float(default_loss(model, b)) for b in data) / 3
        run = sw.sparse_activations(model, "sparsing-law", data=data, perplexity=0.001)
        sparse = sum(float(default_loss(model, b)) for b in data) / 3
    assert math.exp(sparse - dense) <= 1.001 + 1e-6
    assert run.density < 1.0


def test_one_rule_for_what_reads_the_same_inputs():
    model, data = llama(), texts()
    run = sw.sparse_activations(model, "wina", sparsity=0.5, data=data, per="input")
    layer = "model.layers.0.self_attn."
    rules = [run.gates[layer + n].rule for n in ("q_proj", "k_proj", "v_proj")]
    assert rules[0].same(rules[1]) and rules[0].same(rules[2])
    weights = [model.get_submodule(layer + n).weight for n in ("q_proj", "k_proj", "v_proj")]
    assert torch.allclose(rules[0].weight, torch.cat(weights).norm(dim=0))
    assert not rules[0].same(run.gates[layer + "o_proj"].rule)


def test_greedy_meets_the_mean_and_beats_uniform_on_its_block():
    model, data = llama(), texts(count=1)
    block = model.model.layers[0]
    seen = {}
    hook = block.register_forward_hook(
        lambda m, a, o: seen.__setitem__("y", o[0] if isinstance(o, tuple) else o)
    )
    logits(model, data[0])
    dense = seen["y"]
    errors, means = {}, {}
    for allocation in ("uniform", "greedy"):
        run = sw.sparse_activations(model, "teal", sparsity=0.5, data=data, allocation=allocation)
        logits(model, data[0])
        errors[allocation] = float((seen["y"] - dense)[:, 18:].norm())
        inside = {n: g for n, g in run.gates.items() if n.startswith("model.layers.0.")}
        weights = {n: model.get_submodule(n).weight.numel() for n in inside}
        means[allocation] = sum(g.rule.share * weights[n] for n, g in inside.items()) / sum(
            weights.values()
        )
        run.remove()
    hook.remove()
    assert means["greedy"] == pytest.approx(0.5, abs=0.01)
    assert errors["greedy"] < errors["uniform"]


def test_misuse_is_refused_and_changes_nothing():
    model = llama()
    for given, error, text in (
        ({"sparsity": 1.0}, InvalidArgument, "must be in"),
        ({"data": []}, DataError, "no batch"),
        ({"method": "magnitude"}, InvalidArgument, "is one-shot, not activation"),
        ({"method": "cats", "allocation": "greedy"}, InvalidArgument, "is for inputs"),
        ({"method": "wina", "select": "most"}, InvalidArgument, "select="),
        ({"tokens": 0}, InvalidArgument, "tokens"),
    ):
        with pytest.raises(error, match=text):
            sw.sparse_activations(model, **({"data": texts()} | given))
        assert not any(True for m in model.modules() for _ in gates(m))
    with pytest.raises(ModelError, match="no gated MLP"):
        sw.sparse_activations(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "cats",
                              data=[torch.randn(3, 4)])  # fmt: skip
    run = sw.sparse_activations(model, "teal", data=texts())
    with pytest.raises(ModelError, match="has a gate already"):
        sw.sparse_activations(model, "teal", data=texts())
    run.remove()
    with pytest.raises(InvalidArgument, match="share"):
        quantile(torch.ones(3), 1.5)


def test_damaged_files_are_refused(tmp_path):
    model = llama()
    run = sw.sparse_activations(model, "wina", data=texts())
    path = tmp_path / "gates.safetensors"
    run.save(path)
    run.remove()
    with pytest.raises(CheckpointError, match="no such file"):
        sw.load_activations(tmp_path / "none", model)
    whole = path.read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        sw.load_activations(tmp_path / "half", model)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not gates"):
        sw.load_activations(tmp_path / "other", model)
    with pytest.raises(ModelError, match="inputs, the gate"):
        sw.load_activations(path, llama(hidden_size=32))
    with pytest.raises(ModelError, match="no module"):
        sw.load_activations(path, nn.Sequential(nn.Linear(3, 3)))


def test_bf16_models_keep_their_dtype():
    model = llama().bfloat16()
    for method in METHODS:
        run = sw.sparse_activations(model, method, sparsity=0.5, data=texts())
        assert logits(model, texts(1)[0]).dtype == torch.bfloat16
        run.remove()
    gate = InputGate(ActiveInputs(threshold=0.5))
    layer = nn.Linear(4, 2).bfloat16()
    gate.attach(layer)
    assert layer(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
