"""Models that no test names, compiled at 90 % zeros beside torch: speed, and what stays in torch.

    python benchmarks/unseen.py [--only NAME ...] [--out benchmarks/results/unseen.json]

Random weights from each architecture's own configuration, pruned by magnitude per layer, batch 1,
images at the size that the model is made for, texts of 128 tokens. The list was fixed before the
first run; none is left out for its result. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.diagnostics.claims import machine
from sparseworks.engine.measuring import interleaved_ms

IMAGES = (
    "resnet26t", "regnetx_004", "efficientnet_lite0", "mobilenetv3_small_100", "densenet121",
    "vgg11_bn", "dla34", "mixer_s16_224", "resmlp_12_224", "poolformer_s12", "cait_xxs24_224",
    "edgenext_xx_small",
)  # fmt: skip
TEXTS = ("DistilBert", "Roberta", "Electra", "XLMRoberta", "Camembert", "SqueezeBert")
OTHERS = ("ClipVision", "Beit", "Wav2Vec2")
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
         "intermediate_size": 1536}  # fmt: skip


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and what it is called with."""
    torch.manual_seed(0)
    if name in IMAGES:
        import timm

        model = timm.create_model(name)
        return model, {"x": torch.randn(1, *model.default_cfg["input_size"])}
    import transformers as hf

    if name in TEXTS:
        words = {"vocab_size": 1000}
        sizes = (
            {"dim": 384, "n_layers": 6, "n_heads": 12, "hidden_dim": 1536}
            if name == "DistilBert"
            else SMALL
        )
        if name == "SqueezeBert":
            sizes = {**sizes, "embedding_size": 384}
        config = getattr(hf, f"{name}Config")(**words, **sizes)
        ids = torch.randint(5, 1000, (1, 128))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return getattr(hf, f"{name}Model")(config), given
    pixels = {"pixel_values": torch.randn(1, 3, 224, 224)}
    if name == "ClipVision":
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL)), pixels
    if name == "Beit":
        return hf.BeitModel(hf.BeitConfig(**SMALL)), pixels
    config = hf.Wav2Vec2Config(**SMALL, num_feat_extract_layers=7)
    return hf.Wav2Vec2Model(config), {"input_values": torch.randn(1, 16000)}


def row(name: str) -> dict[str, Any]:
    model, given = made(name)
    model.eval()
    sw.prune(model, "magnitude", sparsity=0.9)
    fast = sw.compile(model, given)
    with torch.no_grad():
        ours, theirs = interleaved_ms(lambda: fast(**given), lambda: model(**given))
    return {
        "model": name,
        "kind": fast.kind,
        "ms": ours,
        "torch ms": theirs,
        "faster by": theirs / ours,
        "outside programs": fast.outside.share if fast.outside else None,
        "relative error": fast.error,
        "operators": dict(list(fast.outside.operators.items())[:4]) if fast.outside else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*IMAGES, *TEXTS, *OTHERS])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.only:
        rows.append(row(name))
        print(json.dumps(rows[-1]), flush=True)
    shares = [r["outside programs"] for r in rows if r["outside programs"] is not None]
    result = {
        "machine": machine() | {"timm": version("timm"), "transformers": version("transformers")},
        "median faster by": statistics.median(r["faster by"] for r in rows),
        "slower than torch": [r["model"] for r in rows if r["faster by"] < 1],
        "median share outside programs": statistics.median(shares) if shares else None,
        "at most a tenth outside": sum(s <= 0.1 for s in shares),
        "rows": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
