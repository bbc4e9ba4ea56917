"""Knowledge distillation: a student learns a teacher's softened outputs (Hinton et al. 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation"]


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the last axis, mean over the rest.

    Args:
        student: logits `[..., classes]`.
        teacher: logits of the same shape.
        temperature: T; higher values soften both distributions.
    """
    log_p = F.log_softmax(student.float().flatten(0, -2) / temperature, -1)
    q = F.softmax(teacher.float().flatten(0, -2) / temperature, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2
