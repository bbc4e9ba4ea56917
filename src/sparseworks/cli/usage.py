"""What `--help` of a command ends with: examples of it."""

from __future__ import annotations

__all__ = ["EXAMPLES", "footer"]

EXAMPLES: dict[str, tuple[str, ...]] = {
    "prune": (
        "sparseworks prune minilm --method wanda --sparsity 0.5 --out out/wanda",
        "sparseworks prune ./llama --method sparsegpt --pattern 2:4 --data text.txt --out out/2-4",
        "sparseworks prune ./llama-70b --sparsity 0.5 --data text.txt --stream --out out/70b",
        "torchrun --nproc-per-node 4 -m sparseworks prune ./llama-70b --sparsity 0.5 "
        "--data text.txt --stream --out out/70b",
    ),
    "train": (
        "sparseworks train resnet20 --data train.parquet --eval-data test.parquet "
        "--method rigl --sparsity 0.9 --out runs/rigl",
        "sparseworks train ./llama --data corpus.txt --method gradual --sparsity 0.5 --amp bf16 "
        "--log tensorboard mlflow --out runs/llama",
        "sparseworks train --resume --out runs/llama",
    ),
    "finetune": (
        "sparseworks finetune ./llama --data text.txt --method sparsegpt --pattern 2:4 "
        "--teacher start --eval-data held.txt --out out/recovered",
        "sparseworks finetune ./llama --data chats.jsonl --method ast --pattern 2:4 --amp bf16 "
        "--accumulate 8 --checkpointing --out out/chat",
        "sparseworks finetune minilm --data labelled.csv --method gradual --sparsity 0.8 "
        "--out out/labels",
        "torchrun --nproc-per-node 4 -m sparseworks finetune ./llama --data text.txt "
        "--method wanda --sparsity 0.5 --out out/four",
        "sparseworks finetune --resume --out out/recovered",
    ),
    "recipe": (
        "sparseworks recipe minilm --goal latency=0.3 --budget 5m --out out/best",
        "sparseworks recipe ./llama --goal quality=0.97 --data text.txt --budget 30m --out out/lm",
        "sparseworks recipe timm:convnext_atto --data images --eval-data held --goal size=0.3 "
        "quality=0.98 --out out/image",
    ),
    "slim": (
        "sparseworks slim minilm --flops 0.6 --out out/slim",
        "sparseworks slim torchvision:resnet18 --flops 0.5 --round-to 8 --onnx --out out/resnet",
        "sparseworks slim model.py:make --input-shape 1 3 64 64 --groups",
    ),
    "tickets": (
        "sparseworks tickets resnet20 --data train.parquet --sparsity 0.9 --out runs/ticket",
        "sparseworks tickets resnet20 --data train.parquet --method soup --sparsity 0.9 "
        "--start trained.safetensors --out runs/soup",
    ),
    "quantize": (
        "sparseworks quantize ./llama --method rounding --bits 4 --out out/int4",
        "sparseworks quantize ./llama --method gqsa --bits 4 --data text.txt "
        "--option sparsity=0.5 --out out/gqsa",
    ),
    "activations": (
        "sparseworks activations ./llama --method wina --sparsity 0.5 --data text.txt "
        "--out wina.safetensors",
        "sparseworks compile ./llama --activations wina.safetensors --dtype column-int4",
    ),
    "upcycle": (
        "sparseworks upcycle ./llama --experts 8 --top-k 2 --data text.txt --steps 500 "
        "--out out/mixture",
    ),
    "compile": (
        "sparseworks compile minilm --weights out/wanda/checkpoint --out plan.safetensors",
        "sparseworks compile ./llama --dtype int4 --out decoder",
    ),
    "generate": (
        'sparseworks generate ./llama --prompt "It was a dark night" --dtype int4',
        "sparseworks generate decoder --tokenizer ./llama --chat",
    ),
    "export": (
        "sparseworks export out/checkpoint --to pack-quantized --bits 4 --out out/int4",
        "sparseworks export out/checkpoint --to gguf --type Q4_0 --out model.gguf",
        "sparseworks export timm:convnext_atto:weights=out/model.safetensors --to onnx "
        "--out model.onnx",
    ),
    "bench": (
        "sparseworks bench minilm --sparsity 0.8 0.9 --batch 1 16 --out out/speed",
        "sparseworks bench ./llama --decode --decode-dtypes int8 int4",
    ),
    "evaluate": (
        "sparseworks evaluate out/checkpoint --tasks arc_easy hellaswag --limit 200",
        "sparseworks evaluate decoder --tasks task.yaml",
    ),
    "inspect": (
        "sparseworks inspect out/model.safetensors",
        "sparseworks inspect minilm --all",
    ),
    "compare": (
        "sparseworks compare minilm --methods magnitude wanda sparsegpt --sparsities 0.5 0.7 "
        "--out out/compare",
        "sparseworks compare minilm --methods sparsegpt group-norm rounding sparsegpt+rounding "
        "--bits 8 4 --seeds 0 1 2 --latency --x latency --out out/trade",
        "sparseworks compare minilm --share --out out/together",
    ),
    "curve": (
        "sparseworks curve model.py:make --data digits --metric accuracy --eval-data digits "
        "--out out/curve",
    ),
    "audit": (
        "sparseworks audit dense=runs/dense rigl=runs/rigl",
        "sparseworks audit runs.yaml --strict --out audit.json",
    ),
    "methods": (
        "sparseworks methods",
        "sparseworks methods rigl",
    ),
    "new-method": ("sparseworks new-method my-idea --kind one-shot",),
    "claims": (
        "sparseworks claims list",
        "sparseworks claims run 184",
    ),
    "doctor": ("sparseworks doctor",),
    "demo": ("sparseworks demo --out out/demo",),
    "completion": (
        "sparseworks completion bash > ~/.local/share/bash-completion/completions/sparseworks",
        "sparseworks completion zsh > ~/.zfunc/_sparseworks",
        "sparseworks completion fish > ~/.config/fish/completions/sparseworks.fish",
    ),
}


def footer(name: str) -> str:
    """The end of the help of a command."""
    lines = ["", "examples:", *(f"  {line}" for line in EXAMPLES.get(name, ()))]
    return "\n".join(
        [*lines, "", "--config FILE  options from a YAML or JSON file; the command line wins"]
    )
