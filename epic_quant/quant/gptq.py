"""Error compensation: the columns that are still to come make up for what rounding one column loses.

Frantar et al., "GPTQ" (2022): least ‖X (W - Ŵ)ᵀ‖ given the Hessian XᵀX/n of the layer's inputs X.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant.scales import stored_scale

_BLOCK = 128
_DAMPING = 0.01


class GroupCodec(Protocol):
    """What a `GroupedFormat` does to groups."""

    def fit(self, groups: Tensor) -> Tensor: ...
    def encode(self, groups: Tensor, scale: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor, scale: Tensor) -> Tensor: ...


def check_hessian(hessian: Tensor | None, cols: int) -> Tensor:
    """Gives back `hessian`, or raises QuantizationError: none, not [cols, cols], not finite, not symmetric."""
    if hessian is None:
        raise QuantizationError("gptq needs the Hessian of the layer's inputs, and got none")
    if hessian.shape != (cols, cols):
        raise QuantizationError(
            f"the Hessian has the shape {list(hessian.shape)}; rows of {cols} weights need {[cols, cols]}"
        )
    if not hessian.isfinite().all():
        raise QuantizationError("the Hessian holds NaN or infinity")
    if (hessian - hessian.T).abs().max() > 1e-3 * hessian.abs().max():
        raise QuantizationError("the Hessian is not symmetric")
    return hessian


def inverse_cholesky_factor(hessian: Tensor) -> Tensor:
    """U [cols, cols], fp32, upper triangular, with UᵀU = (hessian + damping)⁻¹; the Hessian is fp32 or fp64.

    Damping is 1% of the mean diagonal, tenfold as often as it takes. An input that was always zero has nothing but the
    damping, so its column is rounded plainly. Raises QuantizationError where there is no factor.
    """
    mean = hessian.diagonal().mean().item() or 1.0
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        # With both axes reversed, the lower factor L of the hessian becomes an upper one, and U is its inverse.
        damped = hessian + identity * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor.float()
    raise QuantizationError("the Hessian is not positive semidefinite")


def encode(weight: Tensor, factor: Tensor, group_size: int, codec: GroupCodec) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and scales [rows, groups], fp16, of `weight` [rows, cols] fp32.

    A group's scale is found when the group is reached, from the weights as compensation has left them.
    """
    columns = weight.T.contiguous()  # a column is read at a time, and should lie together
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    scales = []
    for group in range(0, len(columns), group_size):
        scale = stored_scale(codec.fit(columns[group : group + group_size].T.contiguous()))
        scales.append(scale)
        for start in range(group, group + group_size, _BLOCK):
            stop = min(start + _BLOCK, group + group_size)
            errors = torch.empty_like(columns[start:stop])
            for column in range(start, stop):
                compensation = factor[start:column, column] @ errors[: column - start]
                value = (columns[column] - compensation).unsqueeze(1)
                code = codec.encode(value, scale.float())
                codes[column] = code.squeeze(1)
                error = value - codec.decode(code, scale.float())
                errors[column - start] = error.squeeze(1) / factor[column, column]
            # Later columns learn of a whole block at once, by one matrix product.
            columns[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T.contiguous(), torch.cat(scales, dim=1)
