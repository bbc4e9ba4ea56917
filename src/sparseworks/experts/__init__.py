"""Mixtures of experts: methods that route, registered by name only."""

from sparseworks.core import registry

_ROOM = "sparseworks.experts"

registry.register(
    {
        "activation-gate": f"{_ROOM}.activation_gate:ActivationGate",
        "blockffn": f"{_ROOM}.block_ffn:BlockFFN",
        "comet": f"{_ROOM}.comet:COMET",
        "evomoe": f"{_ROOM}.evo_moe:EvoMoE",
        "graph-of-tokens": f"{_ROOM}.graph_of_tokens:GraphOfTokens",
        "hecate": f"{_ROOM}.hecate:Hecate",
        "moe-llava": f"{_ROOM}.moe_llava:MoELLaVA",
        "ss-moe": f"{_ROOM}.sampled_space:SampledSpace",
        "upcycling": f"{_ROOM}.copying:Upcycling",
    }
)
