"""Soft shrinkage against hard thresholding, random masks and one-shot pruning, on x2 images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import read_images
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.diagnostics.judging import LOOKS
from sparseworks.training.hooked import Run
from sparseworks.weights.dynamic.iss_p import shrinkage_left
from sparseworks.weights.dynamic.masks import chosen_masks, magnitudes

SPARSITY, STAGE, BATCH = 0.95, 1 / 3, 8
STEPS = {"quick": 1_000, "full": 3_000}
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "iss-p": ("iss-p", {"shrink": 0.95, "end": STAGE}),
    "hard": ("iss-p", {"shrink": 0.0, "end": STAGE}),
    "one-shot": ("iss-p", {"shrink": 1.0, "end": STAGE}),
    "random": ("static", {}),
}


class Residual(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class SmallEDSR(nn.Module):
    """EDSR (Lim et al. 2017) x2 without normalisation; it predicts what bicubic misses."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(x)
        return F.pixel_shuffle(self.tail(found + self.body(found)), 2) + bicubic(x, 2.0)


def bicubic(x: Tensor, scale: float) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=scale < 1)


def psnr(model: nn.Module | None, high: Tensor) -> float:
    """Mean PSNR in dB over images in [0, 1]; None: bicubic."""
    found = []
    with torch.no_grad():
        for part in high.split(100):
            low = bicubic(part, 0.5).contiguous(memory_format=torch.channels_last)
            made = (bicubic(low, 2.0) if model is None else model(low)).clamp(0, 1)
            found.append(-10 * (made - part).square().mean((1, 2, 3)).clamp_min(1e-10).log10())
    return float(torch.cat(found).mean())


def _support(run: Run) -> dict[str, Tensor]:
    """Which weights the final sparsity would keep now."""
    return dict(chosen_masks(run, magnitudes(run), SPARSITY))


def _train(seed: int, case: str, high: Tensor, setting: Setting) -> tuple[nn.Module, dict]:
    steps = STEPS[setting]
    torch.manual_seed(seed)
    model = SmallEDSR(32, 8) if setting == "full" else SmallEDSR(16, 2)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.99))
    method, options = CASES[case]
    run = sw.sparsify(model, optimizer, method, sparsity=SPARSITY, steps=steps, seed=seed,
                      budget="uniform", include="*", **options)  # fmt: skip
    cut = round(STAGE * steps)
    decay = torch.optim.lr_scheduler.LambdaLR(  # constant in the stage, then a half cosine
        optimizer,
        lambda t: 1.0 if t < cut else 0.5 + 0.5 * float(torch.tensor(
            (t - cut) / (steps - cut) * torch.pi).cos()),
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    norms: list[float] = []
    moved: list[float] = []
    figures: dict[str, float] = {}
    before = _support(run)
    for step in range(1, steps + 1):
        index = torch.randint(len(high), (BATCH,), generator=g)
        top, left = (2 * int(v) for v in torch.randint(0, 9, (2,), generator=g))
        target = high[index, :, top : top + 16, left : left + 16]
        low = bicubic(target, 0.5).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.l1_loss(model(low), target).backward()
        if step <= cut:
            norms.append(_gradient_norm(model))
        if case == "iss-p" and step == cut:
            figures["left before the cut"] = shrinkage_left(run)
        optimizer.step()
        decay.step()
        if step <= cut and step % (cut // 10) == 0:
            after = _support(run)
            changed = sum(int((after[n] & ~before[n]).sum()) for n in after)
            moved.append(100 * changed / sum(int(m.sum()) for m in after.values()))
            before = after
    run.finish()
    settled = norms[len(norms) // 4 :]  # the first steps fall from the random start in every case
    figures["variation"] = statistics.pstdev(settled) / statistics.fmean(settled)
    figures["first turnover"] = statistics.fmean(moved[:3])
    figures["last turnover"] = statistics.fmean(moved[-3:])
    return model.eval(), figures


def _gradient_norm(model: nn.Module) -> float:
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    root = data_root() / "cifar10"
    order = torch.Generator().manual_seed(seed)
    images = read_images(root / "train.parquet", limit=10_000 if setting == "full" else 4_000)
    high = images.pixels[torch.randperm(len(images), generator=order)[:-500]].float() / 255
    held = read_images(root / "test.parquet", limit=500).pixels.float() / 255
    found = {"bicubic PSNR": psnr(None, held)}
    for case in CASES:
        model, figures = _train(seed, case, high, setting)
        found[f"{case} PSNR"] = psnr(model, held)
        found |= {f"{case} {k}": v for k, v in figures.items() if case in ("iss-p", "hard")}
    for case in ("hard", "random", "one-shot", "bicubic"):
        found[f"over {case}"] = found["iss-p PSNR"] - found[f"{case} PSNR"]
    found["steadier gradient"] = found["hard variation"] - found["iss-p variation"]
    found["turnover falls"] = found["iss-p first turnover"] - found["iss-p last turnover"]
    return found


CLAIM = Claim(
    card="049",
    method="iss-p",
    title="soft shrinkage beats hard thresholding, random masks and one-shot pruning at 95 %",
    model="x2 EDSR over bicubic, 2 blocks of 16 channels (full: 8 of 32), 95 % sparse per layer",
    data="CIFAR-10: 8 patches of 8 -> 16 pixels a step, 1,000 steps of Adam (full: 3,000), the "
    "first third before the cut; 500 test images, 16 -> 32 pixels",
    baseline="the same loop with factor 0 (hard thresholding) and 1 (one-shot), a random mask",
    metric="PSNR in dB; deviation over mean of the gradient norm; % of the support that moved",
    promises=(
        Promise("over hard", "PSNR above iterative hard thresholding", margin=0.1),
        Promise("over random", "PSNR above a random mask from scratch", margin=0.1),
        Promise("over one-shot", "PSNR above one-shot magnitude pruning and fine-tuning"),
        Promise("over bicubic", "PSNR above bicubic interpolation"),
        Promise("steadier gradient", "gradient norm varies less than with hard thresholding"),
        Promise("turnover falls", "the support moves less late in the stage than early"),
    ),
    measure=measure,
    looks=LOOKS,
    version=2,
)
