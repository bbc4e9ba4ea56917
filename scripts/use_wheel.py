"""Use an installed wheel, for scripts/check_wheel.sh: in Python and on the command line.

    python -I scripts/use_wheel.py built|torch     run in an empty folder

built: the native kernels must be there; torch: they must not.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import torch
from torch import nn

import sparseworks as sw
from sparseworks.engine.products import SparseLinear

built = sys.argv[1] == "built"
work = pathlib.Path("use") / ("built" if built else "torch")
work.mkdir(parents=True)
bin = pathlib.Path(sys.executable).parent
assert bin.parent in pathlib.Path(sw.__file__).parents, sw.__file__
for absent in ("transformers", "plotly", "pytest", "sklearn", "yaml"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is here: the venv is not bare"


def run(*words):
    ran = subprocess.run([bin / "sparseworks", *words], capture_output=True, text=True)
    assert ran.returncode == 0, f"{words}: {ran.stdout}{ran.stderr}"
    return ran


doctor = json.loads(run("doctor", "--json").stdout)
assert doctor["problems"] == [] and doctor["native"]["built"] == built, doctor["native"]
assert sw.__version__ in run("--version").stdout
assert "wanda" in run("methods").stdout
assert "holds" in run("claims", "list").stdout  # the results that the package brings
assert "complete" in run("completion", "bash").stdout
assert len(run("new-method", "mine", "--out", str(work)).stdout) > 0

(work / "net.py").write_text(
    "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))\n"
)
net = f"{work}/net.py:make"
run("prune", net, "--method", "magnitude", "--sparsity", "0.9", "--out", f"{work}/out")
run("inspect", f"{work}/out/model.safetensors")
run("compile", net, "--weights", f"{work}/out/model.safetensors", "--input-shape", "64")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
x, y = torch.randn(8, 64), torch.randn(8, 64)
result = sw.prune(model, "wanda", sparsity=0.8, data=[x])
optimizer = torch.optim.SGD(model.parameters(), 0.1)
run_ = sw.sparsify(model, optimizer, "fixed")
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
run_.finish()
assert sw.masks(model).violations(model) == {}
sw.save(model, work / "m.safetensors")
fast = sw.compile(model, x)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
print(f"check_wheel: {fast.kind}: {fast.notes}", file=sys.stderr)
weight = model[0].weight.detach()
product = SparseLinear(weight, model[0].bias.detach())  # the kernels, or torch in their place
torch.testing.assert_close(product(x), model[0](x).detach(), rtol=1e-4, atol=1e-4)
