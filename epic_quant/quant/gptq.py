"""Error feedback: what rounding one column loses is made up for by the columns that are still to come.

Frantar et al., "GPTQ" (2022): least ‖X (W - Ŵ)ᵀ‖ given the second moments of the layer's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant.scheme import Scheme, stored_scale

_BLOCK = 128
_DAMPING = 0.01


def check_moments(moments: Tensor | None, cols: int) -> Tensor:
    """Gives back `moments`, or raises QuantizationError: none, not [cols, cols], not finite, not symmetric."""
    if moments is None:
        raise QuantizationError("gptq needs the second moments of the layer's inputs, and got none")
    if moments.shape != (cols, cols):
        raise QuantizationError(f"moments have shape {list(moments.shape)}, but the weight's rows need {[cols, cols]}")
    if not moments.isfinite().all():
        raise QuantizationError("moments hold NaN or infinity")
    if (moments - moments.T).abs().max() > 1e-3 * moments.abs().max():
        raise QuantizationError("moments are not symmetric")
    return moments


def feedback_factor(moments: Tensor) -> Tensor:
    """U [cols, cols], fp32, upper triangular, with UᵀU = (moments + damping)⁻¹; moments are fp32 or fp64.

    Damping is 1% of the mean diagonal, tenfold as often as it takes. An input that was always zero has no moments
    besides its damping, so its column is rounded plainly. Raises QuantizationError for moments with no factor.
    """
    mean = moments.diagonal().mean().item() or 1.0
    identity = torch.eye(moments.shape[0], dtype=moments.dtype)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        # With both axes reversed, the lower factor L of the moments becomes an upper one, and U is its inverse.
        damped = moments + identity * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor.float()
    raise QuantizationError("moments are not positive semidefinite")


def encode_with_feedback(weight: Tensor, factor: Tensor, group_size: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
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
                fed_back = factor[start:column, column] @ errors[: column - start]
                value = (columns[column] - fed_back).unsqueeze(1)
                code = scheme.encode(value, scale.float())
                codes[column] = code.squeeze(1)
                error = value - scheme.decode(code, scale.float())
                errors[column - start] = error.squeeze(1) / factor[column, column]
            # Later columns learn of a whole block at once, by one matrix product.
            columns[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T.contiguous(), torch.cat(scales, dim=1)
