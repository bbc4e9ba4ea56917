"""Small models of random weights, one of each family, built from the configurations of their
libraries (transformers, timm) without a download.

The sizes are those of a test: what is tried is the code that a family runs, not its quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family"]

VOCABULARY = 96
Inputs = Callable[[int, int], dict[str, Tensor]]
"""`(batch, seed) -> keyword arguments`."""


@dataclass(frozen=True)
class Family:
    """How a family is built and called.

    Args:
        kind: the part of the table.
        build: the model, of weights that torch's generator draws.
        inputs: what it is called with, of a batch size and a seed.
    """

    kind: str
    build: Callable[[], nn.Module]
    inputs: Inputs

    def make(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, its products of a size that reaches the outputs."""
        torch.manual_seed(seed)
        model = self.build().eval()
        enliven(model)
        take_statistics(model, self.inputs(4, seed))
        return model


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights of variance 1 / inputs in place of the small ones of an initialisation, under which
    an error in a layer would drown in the residual stream; biases that are not 0."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(std=0.1)
            elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and name == "weight":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 3 and "proj" in name:  # a bank of experts
                parameter.normal_(std=min(parameter.shape[1:]) ** -0.5)
            elif type(module).__name__ == "Conv1D" and name == "weight":
                parameter.normal_(std=parameter.shape[0] ** -0.5)


@torch.no_grad()
def take_statistics(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Batch norms of the data, without which signals die on their way through a deep network."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(**given)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval().momentum = momentum


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(batch: int, seed: int, length: int = 12) -> dict[str, Tensor]:
    tokens = torch.randint(5, VOCABULARY, (batch, length), generator=drawn(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def bare_ids(batch: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(batch, seed)["input_ids"]}


def pairs(batch: int, seed: int) -> dict[str, Tensor]:
    return {**ids(batch, seed), "decoder_input_ids": ids(batch, seed + 1, 7)["input_ids"]}


def pixels(batch: int, seed: int, size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=drawn(seed))}


def texts_and_pixels(batch: int, seed: int) -> dict[str, Tensor]:
    return {**ids(batch, seed), **pixels(batch, seed)}


def images(batch: int, seed: int, size: int = 64) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, size, size, generator=drawn(seed))}


def waves(batch: int, seed: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 1600, generator=drawn(seed))}


def spectra(batch: int, seed: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 64, 32, generator=drawn(seed))}


def speech(batch: int, seed: int) -> dict[str, Tensor]:
    features = torch.randn(batch, 16, 60, generator=drawn(seed))
    return {"input_features": features, "decoder_input_ids": ids(batch, seed, 7)["input_ids"]}


def of_transformers(model: str, config: str, sizes: Mapping[str, Any]) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**sizes)
    if hasattr(made, "use_cache"):
        made.use_cache = False
    built: nn.Module = getattr(transformers, model)(made)
    return built


def of_timm(name: str) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    return made


WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {**WIDTH, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = {**GROUPED, "head_dim": 8}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
PICTURE = {**SIZES, "image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "num_labels": 5}
LAYERS = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
SOUND = {
    **SIZES, "conv_dim": (16, 16, 16), "conv_kernel": (10, 4, 4), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TOWERS = {
    "text_config": {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                    "projection_dim": 16},
    "vision_config": {**PICTURE, "projection_dim": 16},
}  # fmt: skip

LANGUAGE: dict[str, Mapping[str, Any]] = {
    "Llama": GROUPED, "Qwen2": GROUPED, "Qwen3": HEADS, "Mistral": {**GROUPED, "head_dim": None},
    "Gemma": HEADS, "Gemma2": HEADS, "Gemma3": {**HEADS, "sliding_window": 4}, "Phi": GROUPED,
    "Phi3": GROUPED, "GPTNeoX": TEXT, "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTBigCode": GPT, "CodeGen": {**GPT, "rotary_dim": 4},
    "OPT": {**WIDTH, "vocab_size": VOCABULARY, "ffn_dim": 64, "word_embed_proj_dim": 32,
            "max_position_embeddings": 64},
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {**WIDTH, "vocab_size": VOCABULARY, "ffn_hidden_size": 64},
    "Mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
            "max_seq_len": 64},
    "StableLm": GROUPED, "Olmo2": GROUPED, "Granite": GROUPED, "Cohere": GROUPED,
    "Starcoder2": GROUPED, "SmolLM3": GROUPED, "Glm": HEADS, "Nemotron": GROUPED,
    "Exaone4": {**HEADS, "sliding_window": 4},
    "Lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "Mamba": STATES, "Mamba2": {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "RecurrentGemma": {**GROUPED, "lru_width": 32, "attention_window_size": 8,
                       "num_hidden_layers": 3},
    "Rwkv": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
             "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    "Mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**GROUPED, **EXPERTS, **ALL_SPARSE, "moe_intermediate_size": 32,
                 "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**HEADS, **EXPERTS, **ALL_SPARSE, "moe_intermediate_size": 32},
    "Olmoe": {**GROUPED, **EXPERTS},
    "GptOss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {**GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                   "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
                   "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
}  # fmt: skip
ENCODERS: dict[str, Mapping[str, Any]] = {
    "Bert": TEXT, "Roberta": TEXT, "Electra": {**TEXT, "embedding_size": 32},
    "DistilBert": {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4,
                   "hidden_dim": 64},
    "Albert": {**TEXT, "embedding_size": 16},
    "DebertaV2": {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                   "cls_token_id": 1, "sep_token_id": 2},
    "MPNet": TEXT, "SqueezeBert": {**TEXT, "embedding_size": 32},
    "MobileBert": {**TEXT, "intra_bottleneck_size": 16, "embedding_size": 16,
                   "num_feedforward_networks": 2, "true_hidden_size": 16},
    "ConvBert": {**TEXT, "embedding_size": 32}, "RoFormer": {**TEXT, "embedding_size": 32},
    "FNet": {k: v for k, v in TEXT.items() if k != "num_attention_heads"},
}  # fmt: skip
PAIRS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "T5": ("T5ForConditionalGeneration", {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
        "num_heads": 4, "decoder_start_token_id": 0}),
    "Bart": ("BartForConditionalGeneration", LAYERS),
    "Marian": ("MarianMTModel", {**LAYERS, "decoder_vocab_size": VOCABULARY}),
}  # fmt: skip
VISION: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ViT": ("ViTForImageClassification", {**PICTURE, "num_labels": 5}),
    "Beit": ("BeitForImageClassification", {**PICTURE, "num_labels": 5}),
    "Swin": ("SwinForImageClassification", {
        **STAGES, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "window_size": 4}),
    "Swinv2": ("Swinv2ForImageClassification", {
        **STAGES, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "window_size": 4}),
    "ConvNext": ("ConvNextForImageClassification", {
        **STAGES, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "patch_size": 4}),
    "ConvNextV2": ("ConvNextV2ForImageClassification", {
        **STAGES, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "patch_size": 4}),
    "ResNet": ("ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic",
        "num_labels": 5}),
    "Dinov2": ("Dinov2Model", {**PICTURE}),
    "Segformer": ("SegformerForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 5}),
    "Pvt": ("PvtForImageClassification", {
        **STAGES, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2],
        "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}),
    "MobileViT": ("MobileViTForImageClassification", {
        "image_size": 64, "num_labels": 5, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2,
        "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 48]}),
    "PoolFormer": ("PoolFormerForImageClassification", {
        "num_labels": 5, "hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2,
        "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]}),
    "Yolos": ("YolosForObjectDetection", {
        **PICTURE, "image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 5}),
    "CLIPVision": ("CLIPVisionModel", PICTURE), "SiglipVision": ("SiglipVisionModel", PICTURE),
}  # fmt: skip
SOUNDS = ("Wav2Vec2", "Hubert", "WavLM")
CNNS = (
    "resnet18", "efficientnet_b0", "mobilenetv2_050", "mobilenetv3_small_050", "regnetx_002",
    "densenet121", "ghostnet_050", "repvgg_a0", "edgenext_xx_small", "convnext_atto",
)  # fmt: skip
SIZE_OF_IMAGES = {"MobileViT": 64, "ResNet": 64, "PoolFormer": 64, "Segformer": 64}


def families() -> dict[str, Family]:
    found: dict[str, Family] = {}

    def add(kind: str, name: str, model: str, sizes: Mapping[str, Any], inputs: Inputs,
            config: str = "") -> None:  # fmt: skip
        build = partial(of_transformers, model, config or f"{name}Config", sizes)
        found[name] = Family(kind, build, inputs)

    for name, sizes in LANGUAGE.items():
        inputs = bare_ids if name in ("Mamba", "Mamba2", "Rwkv") else ids
        config = "Gemma3TextConfig" if name == "Gemma3" else ""
        add("language models", name, f"{name}ForCausalLM", sizes, inputs, config)
    add("language models", "GPT2", "GPT2LMHeadModel", GPT, ids)
    for name, sizes in ENCODERS.items():
        add("encoders", name, f"{name}Model", sizes, bare_ids if name == "FNet" else ids)
    for name, (model, sizes) in PAIRS.items():
        add("encoders and decoders", name, model, sizes, pairs)
    whisper = {**{k: v for k, v in LAYERS.items() if k != "max_position_embeddings"},
               "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32,
               "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
    add("sound", "Whisper", "WhisperForConditionalGeneration", whisper, speech)
    for name in SOUNDS:
        add("sound", name, f"{name}Model", SOUND, waves)
    add("sound", "AST", "ASTForAudioClassification",
        {**SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64,
         "num_mel_bins": 32, "num_labels": 5}, spectra)  # fmt: skip
    for name, (model, sizes) in VISION.items():
        add("vision", name, model, sizes, partial(pixels, size=SIZE_OF_IMAGES.get(name, 32)))
    trunk = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32],
             "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}  # fmt: skip
    detector = {k: v for k, v in LAYERS.items() if k not in ("vocab_size",)}
    add("vision", "Detr", "DetrForObjectDetection",
        {**detector, "num_queries": 5, "num_labels": 5, "use_timm_backbone": False,
         "use_pretrained_backbone": False, "backbone": None, "backbone_config": trunk},
        partial(pixels, size=64))  # fmt: skip
    add("images and texts", "CLIP", "CLIPModel", {**TOWERS, "projection_dim": 16}, texts_and_pixels)
    add("images and texts", "Siglip", "SiglipModel", TOWERS, texts_and_pixels)
    for name in CNNS:
        found[f"timm {name}"] = Family("timm", partial(of_timm, name), images)
    return found


FAMILIES = families()
