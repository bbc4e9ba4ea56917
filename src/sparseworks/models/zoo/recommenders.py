"""Recommenders from implicit feedback: matrix factorisation and LightGCN.

Interactions are pairs `[n, 2]` of (user, item) that happened. A score is the dot product of a
user's and an item's embedding; training prefers what happened to what did not, by the BPR loss
(Rendle et al. 2009, BPR: Bayesian Personalized Ranking from Implicit Feedback).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument

__all__ = ["LightGCN", "MatrixFactorization", "bpr_loss", "recall"]


class MatrixFactorization(nn.Module):
    """score(u, i) = <p_u, q_i>, one table of users and one of items.

    Args:
        users: number of users.
        items: number of items.
        dim: width of the embeddings.
        std: standard deviation of the first embeddings.
    """

    def __init__(self, users: int, items: int, dim: int = 64, std: float = 0.1) -> None:
        super().__init__()
        if min(users, items, dim) < 1:
            raise InvalidArgument(f"users={users}, items={items}, dim={dim} must be at least 1")
        self.users = nn.Embedding(users, dim)
        self.items = nn.Embedding(items, dim)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=std)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The vectors that scores are made of: `[users, dim]` and `[items, dim]`."""
        return self.users.weight, self.items.weight

    def own(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The trained embeddings of these users and items, what the penalty applies to."""
        return self.users(users), self.items(items)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores `[n]` of the pairs (users[k], items[k])."""
        p, q = self.vectors()
        return (F.embedding(users, p) * F.embedding(items, q)).sum(-1)


class LightGCN(nn.Module):
    """LightGCN (He et al. 2020, LightGCN: Simplifying and Powering Graph Convolution Network for
    Recommendation): e_final = mean_k (D^-1/2 A D^-1/2)^k e, k = 0..layers, over one table.

    Args:
        interactions: `[n, 2]` int64 (user, item) of the training set; duplicates count once.
        users: number of users.
        items: number of items.
        dim: width of the embeddings.
        layers: propagation steps.
        std: standard deviation of the first embeddings.

    Raises:
        InvalidArgument: an index outside the tables.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(
        self,
        interactions: Tensor,
        users: int,
        items: int,
        dim: int = 64,
        layers: int = 3,
        std: float = 0.1,
    ) -> None:
        super().__init__()
        if min(users, items, dim) < 1 or layers < 0:
            raise InvalidArgument(f"users={users}, items={items}, dim={dim}, layers={layers}")
        self.counts, self.layers = (users, items), layers
        self.table = nn.Embedding(users + items, dim)
        nn.init.normal_(self.table.weight, std=std)
        # three dense buffers, because torch cannot copy or move modules with a CSR tensor
        for name, part in zip(
            ("starts", "columns", "values"), _normalized(interactions, users, items)
        ):
            self.register_buffer(name, part, persistent=False)

    @property
    def adjacency(self) -> Tensor:
        """D^-1/2 A D^-1/2, a sparse CSR `[users + items, users + items]`."""
        with warnings.catch_warnings():  # torch warns that CSR is in beta
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(
                self.starts, self.columns, self.values, (sum(self.counts),) * 2
            )

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The propagated vectors: `[users, dim]` and `[items, dim]`."""
        x = self.table.weight
        total, adjacency = x, self.adjacency
        for _ in range(self.layers):
            x = _propagate(adjacency, x)
            total = total + x
        mean = total / (self.layers + 1)
        return mean[: self.counts[0]], mean[self.counts[0] :]

    def own(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The trained (layer 0) embeddings of these users and items."""
        return self.table(users), self.table(items + self.counts[0])

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores `[n]` of the pairs (users[k], items[k])."""
        p, q = self.vectors()
        return (F.embedding(users, p) * F.embedding(items, q)).sum(-1)


def _normalized(interactions: Tensor, users: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts, columns and values of D^-1/2 A D^-1/2 of the user-item graph."""
    if interactions.ndim != 2 or interactions.shape[1] != 2 or not len(interactions):
        raise InvalidArgument(f"interactions: [n, 2] is needed, not {list(interactions.shape)}")
    u, i = torch.unique(interactions.long(), dim=0).T
    if int(u.min()) < 0 or int(u.max()) >= users or int(i.min()) < 0 or int(i.max()) >= items:
        raise InvalidArgument(
            f"interactions: users {int(u.min())} to {int(u.max())} and items {int(i.min())} to "
            f"{int(i.max())} do not fit tables of {users} and {items}"
        )
    nodes = users + items
    rows, columns = torch.cat([u, i + users]), torch.cat([i + users, u])
    order = torch.argsort(rows * nodes + columns)
    count = torch.bincount(rows, minlength=nodes)
    values = (count[rows] * count[columns]).float().rsqrt()
    starts = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return starts, columns[order], values[order]


class _Propagate(torch.autograd.Function):
    """A x with A sparse and symmetric, so that the gradient is A g (no transpose is built)."""

    @staticmethod
    def forward(ctx, adjacency, x):  # type: ignore[no-untyped-def]
        ctx.adjacency = adjacency
        return adjacency @ x

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return None, ctx.adjacency @ gradient.contiguous()


def _propagate(adjacency: Tensor, x: Tensor) -> Tensor:
    result: Tensor = _Propagate.apply(adjacency, x)  # type: ignore[no-untyped-call]
    return result


def bpr_loss(
    model: MatrixFactorization | LightGCN,
    users: Tensor,
    liked: Tensor,
    other: Tensor,
    regularization: float = 1e-4,
) -> Tensor:
    """mean softplus(s_other - s_liked) + regularization * 1/2 sum(|e_u|^2 + |e_i|^2 + |e_j|^2) / n.

    Args:
        users, liked, other: int64 `[n]`: a user, an item of hers, an item that is not.
        regularization: on the trained embeddings of this batch.
    """
    p, q = model.vectors()
    e_u, e_i, e_j = (F.embedding(k, t) for k, t in ((users, p), (liked, q), (other, q)))
    loss = F.softplus((e_u * (e_j - e_i)).sum(-1)).mean()
    own_u, own_i = model.own(users, liked)
    own_j = model.own(users, other)[1]
    squares = own_u.square().sum() + own_i.square().sum() + own_j.square().sum()
    return loss + regularization * 0.5 * squares / len(users)


@torch.no_grad()
def recall(
    model: MatrixFactorization | LightGCN, seen: Tensor, held: Tensor, at: int = 20
) -> float:
    """Recall@`at`: the mean over users of the share of held-out items among their best `at`.

    Args:
        seen: `[n, 2]` interactions that are not recommended again.
        held: `[m, 2]` interactions to find; users without any do not count.
    """
    p, q = model.vectors()
    scores = p @ q.T
    scores[seen[:, 0], seen[:, 1]] = -torch.inf
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    wanted[held[:, 0], held[:, 1]] = True
    hits = wanted.gather(1, scores.topk(at, dim=1).indices).sum(1)
    number = wanted.sum(1)
    return float((hits[number > 0] / number[number > 0]).mean())
