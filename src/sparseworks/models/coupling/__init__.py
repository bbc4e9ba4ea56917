"""Which channels of which tensors must be cut together, found from the model's own graph.

coupling = trace(model, example)
print(coupling)          # every family of groups, before anything is cut
coupling.flops()         # of the products on the example
"""

from sparseworks.models.coupling.functions import Function
from sparseworks.models.coupling.groups import Coupling, Family, Group, Slice
from sparseworks.models.coupling.trace import CouplingError, trace

__all__ = ["Coupling", "CouplingError", "Family", "Function", "Group", "Slice", "trace"]
