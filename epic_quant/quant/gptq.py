"""Error compensation: the columns that are still to come make up for what rounding one column loses.

Frantar et al., "GPTQ" (2022): least ‖X (W - Ŵ)ᵀ‖ given the Hessian XᵀX/n of the layer's inputs X.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant import hadamard

_BLOCK = 128
_DAMPING = 0.01

# Columns of the factor found at a time: so the zeros below its diagonal are not computed.
_FACTOR_COLUMNS = 1024
# Rows of a Hessian that are compared with its columns at a time.
_SYMMETRY_ROWS = 256


class GroupCodec(Protocol):
    """What a `GroupedFormat` does to groups."""

    def encode(self, groups: Tensor, scale: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor, scale: Tensor) -> Tensor: ...


class Hessian:
    """The mean of x xᵀ over a layer's inputs x, with the inverse Cholesky factors of it: one for each rotation.

    They depend on nothing else, so weights that multiply the same input share one of these, and so do all specs.
    `read` gives it, fp32 or fp64 [cols, cols], or [cols] where its diagonal alone is known, of which there is no
    factor; only factors and the diagonal are kept, once they have been asked for.
    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read
        self._factors: dict[int, Tensor] = {}  # by Hadamard block
        self._diagonal: Tensor | None = None

    @classmethod
    def given(cls, hessian: Tensor | Hessian | None, stage: str) -> Hessian:
        """What was given to a stage that needs it; raises QuantizationError where that is none."""
        if hessian is None:
            raise QuantizationError(f"{stage} needs the Hessian of the layer's inputs, and got none")
        return hessian if isinstance(hessian, Hessian) else cls(lambda: hessian)

    def diagonal(self, cols: int) -> Tensor:
        """[cols], the mean of the squared inputs. Raises QuantizationError where the Hessian is not [cols, cols]."""
        if self._diagonal is None:
            hessian = self.read()
            self._diagonal = hessian if hessian.shape == (cols,) else _of_shape(hessian, cols).diagonal().clone()
        return self._diagonal

    def factor(self, cols: int, hadamard_block: int) -> Tensor:
        """As `inverse_cholesky_factor`, for rows of `cols` rotated in such blocks; 0 is not rotated.

        Raises QuantizationError where the Hessian is not [cols, cols], not finite or not symmetric.
        """
        if hadamard_block not in self._factors:
            hessian = self.read()
            if hessian.dim() == 1:
                raise QuantizationError("gptq needs the Hessian of the layer's inputs, and got its diagonal alone")
            hessian = _checked(_of_shape(hessian, cols))
            if hadamard_block:
                hessian = hadamard.rotate(hadamard.rotate(hessian, hadamard_block).T, hadamard_block)
            self._factors[hadamard_block] = inverse_cholesky_factor(hessian)
        return self._factors[hadamard_block]


def _of_shape(hessian: Tensor, cols: int) -> Tensor:
    if hessian.shape != (cols, cols):
        raise QuantizationError(
            f"the Hessian has the shape {list(hessian.shape)}; rows of {cols} weights need {[cols, cols]}"
        )
    return hessian


def _checked(hessian: Tensor) -> Tensor:
    least, largest = hessian.aminmax()
    if not (least.isfinite() and largest.isfinite()):
        raise QuantizationError("the Hessian holds NaN or infinity")
    rows = zip(hessian.split(_SYMMETRY_ROWS), hessian.split(_SYMMETRY_ROWS, dim=1), strict=True)
    most = max((mirrored.T.contiguous() - own).abs_().max() for own, mirrored in rows)
    if most > 1e-3 * torch.maximum(-least, largest):
        raise QuantizationError("the Hessian is not symmetric")
    return hessian


def inverse_cholesky_factor(hessian: Tensor) -> Tensor:
    """U [cols, cols], fp32, upper triangular, with UᵀU = (hessian + damping)⁻¹; the Hessian is fp32 or fp64.

    Damping is 1% of the mean diagonal, tenfold as often as it takes. An input that was always zero has nothing but the
    damping, so its column is rounded plainly. Raises QuantizationError where there is no factor.
    """
    mean = hessian.diagonal().mean().item() or 1.0
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        # With both axes reversed, the lower factor L of the hessian becomes an upper one, and U is its inverse.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            return _inverse_of_upper(lower.flip(0, 1)).float()
    raise QuantizationError("the Hessian is not positive semidefinite")


def _inverse_of_upper(matrix: Tensor) -> Tensor:
    """That of an upper triangular matrix [n, n], some columns at a time: they have nothing in the rows below."""
    inverse = torch.zeros_like(matrix)
    for start in range(0, len(matrix), _FACTOR_COLUMNS):
        stop = min(start + _FACTOR_COLUMNS, len(matrix))
        identity = matrix.new_zeros(stop, stop - start)
        identity[start:].fill_diagonal_(1)
        inverse[:stop, start:stop] = torch.linalg.solve_triangular(matrix[:stop, :stop], identity, upper=True)
    return inverse


def encode(
    weight: Tensor, factor: Tensor, group_size: int, codec: GroupCodec, fit: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and scales [rows, groups], fp16, of `weight` [rows, cols] fp32.

    `fit` finds the scales [n, scales a group], fp16, of groups [n, size]: when the group is reached, from the weights
    as compensation has left them.
    """
    columns = weight.T.contiguous()  # a column is read at a time, and should lie together
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    scales = []
    for group in range(0, len(columns), group_size):
        scales.append(fit(columns[group : group + group_size].T.contiguous()))
        scale = scales[-1].float()
        for start in range(group, group + group_size, _BLOCK):
            stop = min(start + _BLOCK, group + group_size)
            errors = torch.empty_like(columns[start:stop])
            for column in range(start, stop):
                compensation = factor[start:column, column] @ errors[: column - start]
                value = (columns[column] - compensation).unsqueeze(1)
                code = codec.encode(value, scale)
                codes[column] = code.squeeze(1)
                error = value - codec.decode(code, scale)
                errors[column - start] = error.squeeze(1) / factor[column, column]
            # Later columns learn of a whole block at once, by one matrix product.
            columns[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T.contiguous(), torch.cat(scales, dim=1)


def encode_blocks(
    weight: Tensor, factor: Tensor, size: int, encode_block: Callable[[int, Tensor, Tensor], Tensor]
) -> None:
    """Compensate errors of blocks of `size` columns in those after them; overwrites `weight` [rows, cols] fp32.

    `encode_block` gets a block's first column, all columns from it on, as compensation has left them, and their part of
    the factor, [rows, the rest] and [the rest, the rest]. It compensates errors within the block, and gives back what
    its weights become, [rows, columns of the block].
    """
    for start in range(0, weight.shape[1], size):
        rest = slice(start, None)
        block = slice(start, min(start + size, weight.shape[1]))
        error = weight[:, block] - encode_block(start, weight[:, rest], factor[rest, rest])
        # What the columns, one by one, have had to compensate where they came out so.
        error = torch.linalg.solve_triangular(factor[block, block], error, upper=True, left=False)
        weight[:, block.stop :] -= error @ factor[block, block.stop :]
