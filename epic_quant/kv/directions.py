"""Rotating heads so that their first coordinates lie along the directions in which some tokens vary most.

That is principal component analysis; KVTC (Staniszewski and Łańcucki, 2025) finds with it that few directions hold most
of the K and V of large models. The rotation is a product of Householder reflections, orthogonal whatever they are:
rounded to fp16 they rotate to slightly other directions, and back as exactly. They are all that is stored of it.

In shapes N is tokens, H heads, D dims, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reflectors(tokens: Tensor, directions: int, dtype: torch.dtype) -> Tensor:
    """For the first directions of the tokens [N, H, D] about zero, fp32: [H, R, D] in `dtype`.

    Tokens that vary in fewer directions leave the others to chance.
    """
    x = tokens.transpose(0, 1).double()
    _, _, found = torch.linalg.svd(x, full_matrices=len(tokens) < directions)  # rows, the largest variance first
    # Below the diagonal stand the reflectors of a QR decomposition; the 1 that each has on it does not.
    below, _ = torch.geqrf(found[:, :directions].mT)
    whole = below.tril(-1) + torch.eye(tokens.shape[-1], directions, dtype=below.dtype)
    return torch.nn.functional.normalize(whole.mT, dim=-1).to(dtype)


def rotate(x: Tensor, reflectors: Tensor) -> Tensor:
    """Heads x [N, H, D], fp32, along the directions of the reflectors [H, R, D] and then others: [N, H, D].

    Norms and inner products stay. Added up in fp64, since sums of fp32 depend on how many tokens come together.
    """
    return _reflect(x.double(), reflectors, back=False).float()


def unrotate(x: Tensor, reflectors: Tensor) -> Tensor:
    """The inverse of `rotate`, which is its transpose, in fp32; `x` is overwritten."""
    return _reflect(x, reflectors, back=True)


def _reflect(x: Tensor, reflectors: Tensor, *, back: bool) -> Tensor:
    """By I - v vᵀ / (vᵀ v / 2) one after the other, which together are I - Vᵀ T V (Schreiber and Van Loan, 1989)."""
    v = reflectors.double()
    # T is the inverse of the products on and above the diagonal, with half of it (Puglisi, 1992).
    inverse = (v @ v.mT).triu()
    inverse.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    right = torch.linalg.solve_triangular(inverse.mT if back else inverse, v, upper=not back)
    v, right = v.to(x.dtype), right.to(x.dtype)
    for heads, its_v, its_right in zip(x.unbind(1), v, right, strict=True):
        heads.addmm_(heads @ its_v.mT, its_right, alpha=-1)
    return x
