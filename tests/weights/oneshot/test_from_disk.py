"""Pruning from disk gives what pruning in memory gives, bit for bit, however often it is killed."""

from __future__ import annotations

import json

import pytest
import torch
from test_decoder_families import _OWN, _TEXT, FAMILIES, SIZES

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.weights.oneshot.job import Job
from sparseworks.weights.oneshot.staging import Staging

transformers = pytest.importorskip("transformers")


def make_folder(family, path, dtype=torch.float32):
    torch.manual_seed(0)
    config_class = getattr(transformers, _TEXT.get(family, f"{family}Config"))
    sizes = {} if family == "GPT2" else SIZES
    config = config_class(**{**sizes, "vocab_size": 64, **FAMILIES[family]})
    model = getattr(transformers, _OWN.get(family, f"{family}ForCausalLM"))(config)
    model.to(dtype).eval().save_pretrained(path, max_shard_size="20KB")
    return path


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 64, (2, 12), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    made[1]["attention_mask"][0, :4] = 0
    return made


def tensors(folder):
    with sw.io.opening.open_checkpoint(folder) as checkpoint:
        return {n: checkpoint.read(n) for n in checkpoint.tensors}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


def in_memory(source, path, method, **options):
    model = sw.from_pretrained(source)
    result = sw.prune(model, method, **options)
    sw.export_dense(model, path)
    return result


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_as_in_memory(family, method, tmp_path):
    source = make_folder(family, tmp_path / "source")
    options = {"sparsity": 0.5, "data": None if method == "magnitude" else batches()}
    expected = in_memory(source, tmp_path / "memory", method, **options)
    result = sw.prune_folder(source, tmp_path / "disk", method, shard_size="30KB", **options)
    assert equal(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert dict(result.skipped) == dict(expected.skipped)
    assert [t.name for t in result.tensors] == [t.name for t in expected.tensors]
    assert [t.error for t in result.tensors] == [t.error for t in expected.tensors]
    assert result.warnings == expected.warnings
    for name in expected.masks:
        assert torch.equal(result.masks[name], expected.masks[name])
    assert not (tmp_path / "disk.part").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "pattern": "2:4"},
        {"method": "wanda", "sparsity": 0.5, "propagate": "dense"},
        {"method": "wanda", "sparsity": 0.6, "recovery": "dsnot"},
        {"method": "magnitude", "sparsity": 0.5, "recovery": "refit"},
        {"method": "sparsegpt", "sparsity": 0.5, "budget": "erk"},
        {"method": "random", "sparsity": 0.5, "exclude": "*down_proj*", "seed": 3},
        {"method": "wanda", "sparsity": 0.5, "include": ["*q_proj*", "lm_head"]},
    ],
    ids=str,
)
def test_options_as_in_memory_in_bf16(options, tmp_path):
    source = make_folder("Llama", tmp_path / "source", torch.bfloat16)
    data = None if options["method"] == "random" else batches()
    in_memory(source, tmp_path / "memory", **options, data=data)
    sw.prune_folder(source, tmp_path / "disk", **options, data=data, spill=True)
    assert equal(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert {f.name for f in (tmp_path / "disk").iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "masks",
    }  # fmt: skip


def test_shards_and_index_are_those_of_transformers(tmp_path):
    source = make_folder("Llama", tmp_path / "source")
    model = sw.from_pretrained(source)
    sw.prune(model, "magnitude", sparsity=0.5)
    model.save_pretrained(tmp_path / "memory", max_shard_size="30KB")
    sw.prune_folder(source, tmp_path / "disk", "magnitude", sparsity=0.5, shard_size="30KB")
    written = {p.name for p in (tmp_path / "memory").iterdir()}
    assert written == {p.name for p in (tmp_path / "disk").iterdir()} - {"masks"}
    for name in written:  # byte for byte
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
def test_packed_as_save_packs(family, tmp_path):
    source = make_folder(family, tmp_path / "source", torch.bfloat16)
    model = sw.from_pretrained(source)
    sw.prune(model, "wanda", pattern="2:4", data=batches())
    sw.save(model, tmp_path / "memory")
    sw.prune_folder(
        source, tmp_path / "disk", "wanda", pattern="2:4", data=batches(), layout="packed"
    )
    for name in ("sparseworks.safetensors", "config.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert not (tmp_path / "disk.part").exists()


def test_converted_weights_as_in_memory(tmp_path):
    source = make_folder("Qwen2", tmp_path / "source", torch.bfloat16)
    model = sw.from_pretrained(source, dtype=torch.float32)
    sw.prune(model, "sparsegpt", sparsity=0.5, data=batches())
    sw.export_dense(model, tmp_path / "memory")
    sw.prune_folder(
        source, tmp_path / "disk", "sparsegpt", sparsity=0.5, data=batches(), dtype=torch.float32
    )
    assert equal(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))


def test_the_masks_beside_the_weights_are_read_where_they_are_obeyed(tmp_path):
    source = make_folder("Mixtral", tmp_path / "source")
    out = tmp_path / "disk"
    result = sw.prune_folder(source, out, "wanda", pattern="2:4", data=batches())
    record = sw.masks(sw.from_pretrained(out))
    assert record.method == "wanda" and set(record) == set(result.masks)
    for name in record:
        assert torch.equal(record[name], result.masks[name])
        assert record.entry(name).pattern == "2:4"
        assert record.entry(name).kept == result.masks.entry(name).kept
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    model.save_pretrained(out)
    assert set(sw.masks(sw.from_pretrained(out))) == set(record) - {name}
    model = transformers.AutoModelForCausalLM.from_pretrained(make_folder("Llama", tmp_path / "b"))
    model.save_pretrained(out)
    with pytest.raises(CheckpointError, match="not a mask of this model"):
        sw.from_pretrained(out)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("spill", [False, True])
def test_goes_on_after_a_kill_without_doing_a_block_twice(spill, propagate, tmp_path, monkeypatch):
    source = make_folder("Gemma3", tmp_path / "source")
    call = {
        "method": "wanda", "sparsity": 0.5, "data": batches(), "spill": spill,
        "propagate": propagate,
    }  # fmt: skip
    sw.prune_folder(source, tmp_path / "whole", **call)
    committed, commit = [], Staging.commit

    def dies_after(self, unit):
        commit(self, unit)
        committed.append(unit)
        raise Killed

    def dies_before(self, unit):
        raise Killed

    out = tmp_path / "disk"
    for position, dying in enumerate([dies_before, dies_after, dies_before, dies_after]):
        monkeypatch.setattr(Staging, "commit", dying)
        with pytest.raises(Killed):
            sw.prune_folder(source, out, **call, resume=position > 0)
        assert not out.exists()
    with open(tmp_path / "disk.part" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"unit": "model.lay')  # torn in the middle of a line
    monkeypatch.setattr(Staging, "commit", commit)
    pruned, prune_one = [], Job.prune_one
    monkeypatch.setattr(
        Job, "prune_one",
        lambda self, view, *rest: (pruned.append(view.name), prune_one(self, view, *rest)),
    )  # fmt: skip
    result = sw.prune_folder(source, out, **call, resume=True)
    assert len(committed) == 2 and not any(n.startswith(tuple(committed)) for n in pruned)
    assert equal(tensors(out), tensors(tmp_path / "whole"))
    assert {t.name for t in result.tensors} == set(result.masks)


def test_what_is_refused(tmp_path):
    source = make_folder("Llama", tmp_path / "source")
    out = tmp_path / "disk"
    data = batches()
    for method, options, message in [
        ("snip", {"data": data}, "whole model"),
        ("stun", {"data": data}, "whole model"),
        ("magnitude", {"budget": "global"}, "scores of all weights"),
        ("wanda", {"data": data, "budget": "owl"}, "measures the whole model"),
        ("wanda", {}, "calibration batches"),
        ("magnitude", {"layout": "zip"}, "dense"),
        ("magnitude", {"shard_size": "many"}, "size"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            sw.prune_folder(source, out, method, sparsity=0.5, **options)
    with pytest.raises(CheckpointError, match="nothing was begun"):
        sw.prune_folder(source, tmp_path / "other", "magnitude", sparsity=0.5, resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}
    with pytest.raises(CheckpointError, match="config"):
        sw.prune_folder(tmp_path, out, "magnitude", sparsity=0.5)
    model = sw.from_pretrained(source)
    sw.save(model, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="export_dense"):
        sw.prune_folder(tmp_path / "packed", out, "magnitude", sparsity=0.5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight: 1 weights are NaN"):
        sw.prune_folder(tmp_path / "broken", out, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="interrupted there"):
        sw.prune_folder(source, out, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="was begun with sparsity"):
        sw.prune_folder(tmp_path / "broken", out, "magnitude", sparsity=0.6, resume=True)
    with pytest.raises(InvalidArgument, match="was begun with model"):
        sw.prune_folder(source, out, "magnitude", sparsity=0.5, resume=True)


def test_the_journal_survives_a_torn_line(tmp_path):
    from sparseworks.weights.oneshot.staging import Journal

    journal = Journal(tmp_path / "journal")
    journal.begin({"method": "wanda"})
    journal.add({"unit": "a"})
    with open(journal.path, "ab") as file:
        file.write(b'{"unit"')
    assert journal.read() == ({"method": "wanda"}, [{"unit": "a"}])
    journal.add({"unit": "b"})
    assert [line["unit"] for line in journal.read()[1]] == ["a", "b"]
    assert json.loads(journal.path.read_text().splitlines()[0]) == {"method": "wanda"}
