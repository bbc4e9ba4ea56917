"""Methods that make activations sparse. Registered by name only."""

from sparseworks.core import registry

_ROOM = "sparseworks.activations"

registry.register(
    {
        "cats": f"{_ROOM}.chess:CATS",
        "chess": f"{_ROOM}.chess:CHESS",
        "delta": f"{_ROOM}.delta:Delta",
        "lazy-neuron": f"{_ROOM}.lazy_neuron:LazyNeuron",
        "r-sparse": f"{_ROOM}.r_sparse:RSparse",
        "spark": f"{_ROOM}.spark:Spark",
        "sparsing-law": f"{_ROOM}.sparsing_law:CETT",
        "teal": f"{_ROOM}.teal:TEAL",
        "wina": f"{_ROOM}.wina:WINA",
    }
)
