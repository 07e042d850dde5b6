"""Error compensation: what is still to be rounded makes up for what rounding the rest has lost.

Frantar et al., "GPTQ" (2022): columns, for the least ‖X (W - Ŵ)ᵀ‖ given the Hessian XᵀX/n of the layer's inputs X.
Tseng et al., "Model-Preserving Adaptive Rounding" (2025), YAQA: rows too, given that of the gradients at its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from epic_quant.errors import QuantizationError
from epic_quant.quant import hadamard

_BLOCK = 128
_DAMPING = 0.01

# Columns of the factor found at a time: so the zeros below its diagonal are not computed.
_FACTOR_COLUMNS = 1024
# What is added to the diagonal of an outputs' Hessian, of itself. Few tokens have most of the gradients, so what rows
# seem to have in common is partly chance.
_SHRINKAGE = 0.1
# Rows that are rounded together before those that follow learn of it, of every block of the outputs' Hessian: some, so
# that a column of them is long enough to outweigh what starting an operation takes, but in no fewer steps than that.
_TOGETHER, _STEPS = 32, 16
# Times that all weights are rounded once more.
SWEEPS = 2
# Rows of the blocks of outputs' Hessians at most: E4B's hidden state has so many, and whole Hessians of wider layers
# would take most of a file of them and of the time.
_OUTPUT_ROWS = 2560
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
    factor; only factors and the diagonal are kept, once they have been asked for. `output` is of one weight alone.
    """

    def __init__(self, read: Callable[[], Tensor], output: OutputHessian | None = None) -> None:
        self.read, self.output = read, output
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
            self._factors[hadamard_block] = inverse_cholesky_factor(self.rotated(cols, hadamard_block))
        return self._factors[hadamard_block]

    def rotated(self, cols: int, hadamard_block: int) -> Tensor:
        """The Hessian itself, of rows rotated in such blocks. Raises as `factor`."""
        hessian = self.read()
        if hessian.dim() == 1:
            raise QuantizationError("gptq needs the Hessian of the layer's inputs, and got its diagonal alone")
        hessian = _checked(_of_shape(hessian, cols))
        if hadamard_block:
            hessian = hadamard.rotate(hadamard.rotate(hessian, hadamard_block).T, hadamard_block)
        return hessian

    def with_output(self, output: OutputHessian) -> Hessian:
        """The same, what was made of it included, with a weight's own."""
        found = copy.copy(self)
        found.output = output
        return found

    def row_compensation(self, rows: int, cols: int) -> RowCompensation:
        """For a weight of this shape. Raises QuantizationError where `output` is none or not of so many rows."""
        if self.output is None:
            raise QuantizationError(
                "yaqa needs the Hessian of the gradients at the layer's outputs, and got none; make it with: "
                "python -m epic_quant.calibration --outputs"
            )
        return RowCompensation(*self.output.ordered(rows), cols)


class OutputHessian:
    """The mean of δ δᵀ over the gradients δ at a layer's outputs, from `read`: fp32 or fp64 [blocks, size, size].

    Those are the blocks on the diagonal, each of `size` rows of the weight that follow one another.
    """

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read
        self._ordered: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def shape(rows: int) -> tuple[int, int, int]:
        """[blocks, size, size] for a weight of so many rows: blocks of equal size, as few as may be."""
        blocks = next(blocks for blocks in range(-(-rows // _OUTPUT_ROWS), rows + 1) if rows % blocks == 0)
        return blocks, rows // blocks, rows // blocks

    def ordered(self, rows: int) -> tuple[Tensor, Tensor]:
        """The rows of every block in the order of rounding, int64 [blocks, size], and R of the Hessian in that order.

        R is fp32 [blocks, size, size], upper triangular, with RRᵀ = Hessian + damping, which is a tenth of the diagonal
        and that of `inverse_cholesky_factor`. Rows that matter most come first, so that the others make up for them.
        Raises QuantizationError where the Hessian is not of so many rows, not finite, not symmetric or without a
        factor.
        """
        if self._ordered is None:
            hessian = self.read()
            blocks, size = hessian.shape[:2]
            if hessian.shape != (blocks, size, size) or blocks * size != rows:
                raise QuantizationError(
                    f"the outputs' Hessian has the shape {list(hessian.shape)}; expected blocks of {rows} rows in all"
                )
            diagonal = hessian.diagonal(dim1=1, dim2=2)
            order = diagonal.argsort(dim=1, descending=True, stable=True)
            roots = [
                _upper_root((_checked(block) + (_SHRINKAGE * its).diag())[first][:, first]).float()
                for block, its, first in zip(hessian, diagonal, order, strict=True)
            ]
            self._ordered = order + torch.arange(0, rows, size, device=order.device).unsqueeze(1), torch.stack(roots)
        return self._ordered


class RowCompensation:
    """Rows that are still to be rounded make up for the errors E of those that were, whatever their inputs are.

    tr(Eᵀ RRᵀ E H) with H the inputs' Hessian is the sum of what each row of RᵀE costs, and that has nothing of the rows
    that follow: so it is least where rows K are rounded from values that take -R_KK⁻ᵀ R_JKᵀ E_J off for the rows J
    before them.
    """

    def __init__(self, order: Tensor, root: Tensor, cols: int) -> None:
        self._order, self._root = order, root
        self._errors = root.new_zeros(*order.shape, cols)
        self._at = slice(0, 0)

    def __iter__(self) -> Iterator[Tensor]:
        """The rows to be rounded next; their errors must be learnt before the next are asked for."""
        size = self._order.shape[1]
        together = max(_TOGETHER, size // _STEPS)
        for start in range(0, size, together):
            self._at = slice(start, start + together)
            yield self._order[:, self._at].flatten()

    @property
    def compensation(self) -> Tensor:
        """What the rows' values are to be increased by, [n, cols]."""
        before, own = self._at.start, self._at
        lost = self._root[:, :before, own].mT @ self._errors[:, :before]
        added: Tensor = torch.linalg.solve_triangular(self._root[:, own, own].mT, -lost, upper=False)
        return added.flatten(0, 1)

    @property
    def errors(self) -> Tensor:
        """The rows' own errors, [n, cols], once they have been learnt."""
        return self._errors[:, self._at].flatten(0, 1)

    def pull(self) -> tuple[Tensor, Tensor]:
        """With H the outputs' Hessian, damped: H_KE [n, cols] and H_KK [blocks, n / blocks, n / blocks], rows K."""
        own = self._root[:, self._at] @ self._root.mT
        return (own @ self._errors).flatten(0, 1), own[:, :, self._at]

    def learn(self, errors: Tensor) -> None:
        """Take the rows' errors, [n, cols], from their own values, not from what they were increased to."""
        at = self._errors[:, self._at]
        at.copy_(errors.view_as(at))


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
    return _inverse_of_upper(_upper_root(hessian)).float()


def _upper_root(hessian: Tensor) -> Tensor:
    """R, upper triangular, with RRᵀ = hessian + damping, in its dtype."""
    mean = hessian.diagonal().mean().item() or 1.0
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        # With both axes reversed, the lower factor of the hessian becomes an upper one.
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            root: Tensor = lower.flip(0, 1)
            return root
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


def encode_again(
    codes: Tensor,
    decoded: Tensor,
    scale: Tensor,
    hessian: Tensor,
    pull: Tensor,
    own: Tensor,
    group_size: int,
    codec: GroupCodec,
) -> Tensor:
    """The codes [rows, cols], which stand for `decoded`, rounded once more, each given all others.

    The two-sided error never rises by it. `scale` is fp16 [rows, scales a row], `hessian` that of the inputs, and
    `pull` and `own` are as `RowCompensation.pull` has them. All rows of a column step at once, those alone whose steps
    gain whatever the others do: sᵀHs is at most Σᵢ sᵢ² Σₖ |Hᵢₖ| over the rows k that would step.
    """
    blocks = len(own)
    columns, values, pulled = (each.T.contiguous() for each in (codes, decoded, pull))
    scales = scale.float().view(len(codes), len(columns) // group_size, -1)
    damping = _DAMPING * hessian.diagonal().mean()
    diagonal, size = own.diagonal(dim1=1, dim2=2).flatten(), own.abs()
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        curvature = hessian[start:stop, start:stop] + damping * torch.eye(stop - start)
        slope = hessian[start:stop] @ pulled + damping * pulled[start:stop]
        steps = torch.zeros_like(slope)
        for column in range(start, stop):
            at = column - start
            gradient = slope[at] + curvature[at, :at] @ steps[:at]
            its = scales[:, column // group_size]
            now = values[column]
            code = codec.encode((now - gradient / (diagonal * curvature[at, at])).unsqueeze(1), its)
            step = codec.decode(code, its).squeeze(1) - now
            most = (size @ (step != 0).float().view(blocks, -1, 1)).flatten()
            gains = (2 * gradient + curvature[at, at] * most * step) * step < 0
            columns[column] = torch.where(gains, code.squeeze(1), columns[column])
            steps[at] = (own @ (step * gains).view(blocks, -1, 1)).flatten()
        pulled[start:stop] += steps
    return columns.T.contiguous()
