"""Error compensation: what rounding one column loses is made up for by the columns that are still to come.

Frantar et al., "GPTQ" (2022): least ‖X (W - Ŵ)ᵀ‖ given the Hessians of the layer's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant.scheme import Scheme, stored_scale

_BLOCK = 128
_DAMPING = 0.01


def check_hessian(hessian: Tensor | None, cols: int) -> Tensor:
    """Gives back `hessian`, or raises QuantizationError: none, not [cols, cols], not finite, not symmetric."""
    if hessian is None:
        raise QuantizationError("gptq needs the Hessians of the layer's inputs, and got none")
    if hessian.shape != (cols, cols):
        raise QuantizationError(f"hessian have shape {list(hessian.shape)}, but the weight's rows need {[cols, cols]}")
    if not hessian.isfinite().all():
        raise QuantizationError("hessian hold NaN or infinity")
    if (hessian - hessian.T).abs().max() > 1e-3 * hessian.abs().max():
        raise QuantizationError("hessian are not symmetric")
    return hessian


def inverse_cholesky_factor(hessian: Tensor) -> Tensor:
    """U [cols, cols], fp32, upper triangular, with UᵀU = (hessian + damping)⁻¹; hessian are fp32 or fp64.

    Damping is 1% of the mean diagonal, tenfold as often as it takes. An input that was always zero has no hessian
    besides its damping, so its column is rounded plainly. Raises QuantizationError for hessian with no factor.
    """
    mean = hessian.diagonal().mean().item() or 1.0
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        # With both axes reversed, the lower factor L of the hessian becomes an upper one, and U is its inverse.
        damped = hessian + identity * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor.float()
    raise QuantizationError("hessian are not positive semidefinite")


def encode_with_compensation(weight: Tensor, factor: Tensor, group_size: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and scales [rows, groups], fp16, of `weight` [rows, cols] fp32.

    A group's scale is found when the group is reached, from the weights as the feedback has left them.
    """
    columns = weight.T.contiguous()  # a column is read at a time, and should lie together
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    scales = []
    for group in range(0, len(columns), group_size):
        scale = stored_scale(scheme.fit(columns[group : group + group_size].T.contiguous()))
        scales.append(scale)
        for start in range(group, group + group_size, _BLOCK):
            stop = min(start + _BLOCK, group + group_size)
            errors = torch.empty_like(columns[start:stop])
            for column in range(start, stop):
                compensation = factor[start:column, column] @ errors[: column - start]
                value = (columns[column] - compensation).unsqueeze(1)
                code = scheme.encode(value, scale.float())
                codes[column] = code.squeeze(1)
                error = value - scheme.decode(code, scale.float())
                errors[column - start] = error.squeeze(1) / factor[column, column]
            # Later columns learn of a whole block at once, by one matrix product.
            columns[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T.contiguous(), torch.cat(scales, dim=1)
