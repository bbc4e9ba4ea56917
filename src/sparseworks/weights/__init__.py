"""Methods that zero or factor parameters. Each family registers its methods here by name only."""

from sparseworks.core import registry
from sparseworks.weights import structured as _structured  # registers its methods

_ROOM = "sparseworks.weights"

registry.register(
    {
        "ast": f"{_ROOM}.semistructured.adaptive:AST",
        "bdwp": f"{_ROOM}.semistructured.bidirectional:BDWP",
        "cast": f"{_ROOM}.semistructured.cast:CAST",
        "dass": f"{_ROOM}.dynamic.dass:DASS",
        "dsl": f"{_ROOM}.dynamic.dsl:DSL",
        "fast-sparse-convnets": (f"{_ROOM}.semistructured.fast_sparse_convnets:FastSparseConvNets"),
        "fixed": f"{_ROOM}.dynamic.fixed:Fixed",
        "gradual": f"{_ROOM}.dynamic.gradual:Gradual",
        "granet": f"{_ROOM}.dynamic.granet:GraNet",
        "iss-p": f"{_ROOM}.dynamic.iss_p:ISSP",
        "cptquant": f"{_ROOM}.quantization.cptquant:CPTQuant",
        "gqsa": f"{_ROOM}.quantization.gqsa:GQSA",
        "rounding": f"{_ROOM}.quantization.rounding:Rounding",
        "maskunet": f"{_ROOM}.dynamic.maskunet:MaskUNet",
        "maskllm": f"{_ROOM}.semistructured.maskllm:MaskLLM",
        "lost": f"{_ROOM}.lowrank.lost:LOST",
        "mdgf": f"{_ROOM}.semistructured.gradient_flow:MdGf",
        "pst": f"{_ROOM}.lowrank.pst:PST",
        "rigl": f"{_ROOM}.dynamic.rewiring:RigL",
        "sap": f"{_ROOM}.dynamic.sap:SAP",
        "scl": f"{_ROOM}.dynamic.scl:SCL",
        "sdgf": f"{_ROOM}.semistructured.gradient_flow:SdGf",
        "set": f"{_ROOM}.dynamic.rewiring:SET",
        "slorb": f"{_ROOM}.semistructured.slorb:SLoRB",
        "squarehead": f"{_ROOM}.dynamic.squarehead:SquareHead",
        "sltrain": f"{_ROOM}.lowrank.sltrain:SLTrain",
        "sr-ste": f"{_ROOM}.semistructured.sr_ste:SRSTE",
        "sst": f"{_ROOM}.lowrank.sst:SST",
        "static": f"{_ROOM}.dynamic.rewiring:Static",
        "rewinding": f"{_ROOM}.tickets.rewinding:Rewinding",
        "random-search": f"{_ROOM}.tickets.random_search:RandomSearch",
        "ownership": f"{_ROOM}.tickets.ownership:Ownership",
        "sparse-then-prune": f"{_ROOM}.dynamic.sparse_regularization:SparseRegularization",
        "soup": f"{_ROOM}.tickets.soups:SparseSoup",
        "turbo-vbi": f"{_ROOM}.dynamic.turbo_vbi:TurboVBI",
        "random": f"{_ROOM}.oneshot.random:Random",
        "bip": f"{_ROOM}.dynamic.bip:BiP",
        "sparse-byte-nn": f"{_ROOM}.semistructured.sparse_byte_nn:SparseByteNN",
        "sparse-ift": f"{_ROOM}.dynamic.sparse_ift:SparseIFT",
        "jackpots": f"{_ROOM}.dynamic.jackpots:Jackpots",
        "magnitude": f"{_ROOM}.oneshot.magnitude:Magnitude",
        "snip": f"{_ROOM}.oneshot.snip:Snip",
        "grasp": f"{_ROOM}.oneshot.grasp:Grasp",
        "synflow": f"{_ROOM}.oneshot.synflow:SynFlow",
        "components": f"{_ROOM}.oneshot.components:Components",
        "alpha-pruning": f"{_ROOM}.oneshot.alphapruning:AlphaPruning",
        "dsnot": f"{_ROOM}.oneshot.dsnot:DSnoT",
        "ecoflap": f"{_ROOM}.oneshot.ecoflap:ECoFLaP",
        "owl": f"{_ROOM}.oneshot.owl:OWL",
        "stun": f"{_ROOM}.oneshot.stun:STUN",
        "wanda": f"{_ROOM}.oneshot.wanda:Wanda",
        "sparsegpt": f"{_ROOM}.oneshot.sparsegpt:SparseGPT",
    }
)

del _structured
