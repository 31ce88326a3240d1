"""Singular values of a matrix, without its singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import eigvalsh, svdvals

_OBLONG = 2


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of a matrix in descending order.

    An oblong matrix in single precision or less goes through the smaller Gram matrix in double precision:
    its squares cost half of the double precision's digits, which leaves what single precision has, at a
    third of the time. A matrix near the square has no smaller Gram matrix to gain from.
    """
    if matrix.dtype == torch.float64 or max(matrix.shape) < _OBLONG * min(matrix.shape):
        values: Tensor = svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
        return values
    wide = matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT
    gram = torch.zeros(len(wide), len(wide), dtype=torch.float64, device=wide.device)
    for part in wide.split(len(wide), dim=1):  # never a copy in double precision of all
        precise = part.double()
        gram.addmm_(precise, precise.mT)
    squares: Tensor = eigvalsh(gram).clamp(min=0).flip(0)
    return squares.sqrt()
