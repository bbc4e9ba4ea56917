"""compile, generate and bench --decode for causal language models."""

from __future__ import annotations

import json

import pytest

from sparseworks.cli import main
from sparseworks.kernels.native import available

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.data, pytest.mark.skipif(not available(), reason="the native kernels are not built")
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(data_root):
    return str(data_root / "models" / "novel-llama-6m")


def test_compile_then_generate(folder, tmp_path, capsys):
    out = tmp_path / "decoder.safetensors"
    assert main(["compile", folder, "--dtype", "int8", "--head", "int4", "--out", str(out)]) == 0
    assert "bits a weight" in capsys.readouterr().out
    options = ["--prompt", "It was a dark night", "--max-new-tokens", "9", "--json"]
    texts = []
    for given in ([str(out)], [folder, "--dtype", "int8", "--head", "int4"]):
        assert main(["generate", *given, *options]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"] and texts[0]["tokens"] == 9


def test_generate_streams(folder, capsys):
    assert main(["generate", folder, "--prompt", "The", "--max-new-tokens", "5",
                 "--temperature", "0.8", "--seed", "3"]) == 0  # fmt: skip
    found = capsys.readouterr()
    assert found.out.strip() and "tokens" in found.err


def test_bench_decode_writes_table_and_picture(folder, data_root, tmp_path, capsys):
    text = str(data_root / "text" / "novels-valid.txt")
    assert main(["bench", folder, "--decode", "--sparsity", "0.5", "--decode-dtypes", "int8",
                 "--peers", "transformers", "--repeat", "3", "--data", text,
                 "--out", str(tmp_path), "--json"]) == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    names = [r["candidate"] for r in result["rows"]]
    assert names == ["ours, int8", "ours, 50% unstructured, int8", "transformers bfloat16"]
    dense, sparse, other = result["rows"]
    assert sparse["bytes"] < dense["bytes"] < other["bytes"]
    assert all(r["peak_bytes"] > r["bytes"] for r in result["rows"])
    assert dense["perplexity"] < sparse["perplexity"]
    assert abs(dense["perplexity"] / other["perplexity"] - 1) < 0.03
    assert (tmp_path / "decode.csv").read_text().count("\n") == 4
    assert "perplexity" in (tmp_path / "decode.html").read_text()


@pytest.mark.parametrize("options,message", [
    ([], "either --prompt or --chat"),
    (["--prompt", "x", "--chat"], "either --prompt or --chat"),
    (["--chat", "--json"], "leave --chat out"),
    (["--prompt", "x", "--top-p", "0"], "--top-p"),
    (["--prompt", "x", "--dtype", "int3"], "no dtype"),
    (["--prompt", ""], "no tokens"),
    (["--chat"], "no chat template"),
])  # fmt: skip
def test_misuse_is_said_in_one_line(folder, options, message, capsys):
    assert main(["generate", folder, *options]) == 1
    assert message in capsys.readouterr().err


def test_what_is_no_language_model_is_refused(data_root, tmp_path, capsys):
    resnet = str(data_root / "models" / "resnet20-cifar10.safetensors")
    assert main(["bench", resnet, "--decode"]) == 1
    assert "causal language models" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "no.safetensors"), "--prompt", "x"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["generate", resnet, "--prompt", "x"]) == 1
    assert "not a decoder" in capsys.readouterr().err
