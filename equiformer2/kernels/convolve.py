"""First half of a message: gather both atoms, rotate into the edge frame, radial weights, SO(2) GEMMs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from equiformer2.kernels.chunks import cast_to_autocast, chunks, no_autocast
from equiformer2.kernels.complex_linear import complex_linear, gauss_terms
from equiformer2.kernels.rotation import m_major_starts, order_rows, rotate_from_edges, rotate_to_edges


def convolve_edges(
    x: Tensor,
    blocks: list[Tensor],
    source: Tensor,
    target: Tensor,
    hidden: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    weights: list[Tensor],
    shared_orders: bool,
) -> list[Tensor]:
    """SO(2) convolution of the concatenated source and target features (paper section 4.1 and Figure 1b).

    Per edge and order m the inputs are `radial_m * rotate([x_source, x_target])_m`, flattened to (l, 2C);
    m = 0 has a real weight, m >= 1 a complex one on the coefficients of +m and -m (`complex_linear`).
    Neither the gathered `[E, K, 2C]` nor the rotated `[E, R, 2C]` tensor nor the radial weights are stored.

    Args:
        x: `[N, K, C]` atom features.
        blocks: Wigner-D blocks of the edges (see `kernels.rotation`).
        source, target: `[E]` atom indices.
        hidden: `[E, D]` last hidden layer of the radial function.
        radial_weight, radial_bias: `[P, D]`, `[P]` its last linear layer. P counts (m, l, 2C) inputs,
            or (l, 2C) when `shared_orders` (all m of one degree share their radial weights).
        weights: one matrix per order: `[out_0, (L+1) 2C]` for m = 0 and `[2 out_m, (L+1-m) 2C]` for
            m >= 1, real part above imaginary part.

    Returns:
        `[E, out_0]` and for every m >= 1 `[E, 2 out_m]`, +m then -m.
    """
    frames_need_grad = torch.is_grad_enabled() and any(block.requires_grad for block in blocks)
    if not frames_need_grad:
        # The sums of the complex product are taken before the precision is lowered.
        terms = [weights[0], *(gauss_terms(weight) for weight in weights[1:])]
        hidden, radial_weight, radial_bias, *terms = cast_to_autocast(
            hidden, radial_weight, radial_bias, *terms
        )
        arguments = (x, source, target, hidden, radial_weight, radial_bias, shared_orders, len(blocks))
        with no_autocast(x):
            return list(_ConvolveEdges.apply(*arguments, *blocks, *terms))
    hidden, radial_weight, radial_bias, *weights = cast_to_autocast(
        hidden, radial_weight, radial_bias, *weights
    )
    with no_autocast(x):
        rotated, radial = _inputs(x, blocks, source, target, hidden, radial_weight, radial_bias, slice(None))
        lmax = len(blocks) - 1
        outputs = []
        for m, weight in enumerate(weights):
            product = _order(rotated, lmax, m) * _radial(radial, rotated, lmax, m, shared_orders)
            inputs = product.flatten(2).to(weight.dtype)
            if m == 0:
                outputs.append(inputs[:, 0] @ weight.t())
            else:
                outputs.append(complex_linear(inputs[:, 0], inputs[:, 1], weight))
        return outputs


def _order(rotated: Tensor, lmax: int, m: int) -> Tensor:
    """The rows of order m of an m-major tensor as `[E, 1 or 2, L+1-m, 2C]`."""
    components, degrees = order_rows(lmax, m)
    start = m_major_starts(lmax, m)[m]
    return rotated[:, start : start + components * degrees].unflatten(1, (components, degrees))


def _radial(radial: Tensor, rotated: Tensor, lmax: int, m: int, shared_orders: bool) -> Tensor:
    """The radial weights of order m as `[E, 1, L+1-m, 2C]`."""
    width = rotated.shape[2]
    first = m if shared_orders else sum(lmax + 1 - k for k in range(m))
    degrees = lmax + 1 - m
    return radial[:, first * width : (first + degrees) * width].unflatten(1, (1, degrees, width))


class _ConvolveEdges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, target, hidden, radial_weight, radial_bias, shared_orders, num_blocks, *rest):  # type: ignore[no-untyped-def]
        blocks, terms = list(rest[:num_blocks]), list(rest[num_blocks:])
        ctx.save_for_backward(x, source, target, hidden, radial_weight, radial_bias, *rest)
        ctx.shared_orders, ctx.num_blocks = shared_orders, num_blocks
        widths = [len(terms[0]), *(2 * w.shape[1] for w in terms[1:])]
        outputs = [hidden.new_empty(len(source), width) for width in widths]
        for part in chunks(len(source), _bytes_per_edge(x, radial_weight), x.device):
            rotated, radial = _inputs(x, blocks, source, target, hidden, radial_weight, radial_bias, part)
            for m, (w, out) in enumerate(zip(terms, outputs, strict=True)):
                scale = _radial(radial, rotated, num_blocks - 1, m, shared_orders)
                inputs = (_order(rotated, num_blocks - 1, m) * scale).flatten(2).to(w.dtype)
                if m == 0:
                    torch.mm(inputs[:, 0], w.t(), out=out[part])
                    continue
                positive, negative = inputs.unbind(1)
                common = torch.mm(positive + negative, w[0].t())
                half = w.shape[1]
                torch.sub(common, torch.mm(negative, w[2].t()), out=out[part, :half])
                torch.add(common, torch.mm(positive, w[1].t()), out=out[part, half:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # type: ignore[no-untyped-def]
        x, source, target, hidden, radial_weight, radial_bias, *rest = ctx.saved_tensors
        blocks, terms = rest[: ctx.num_blocks], rest[ctx.num_blocks :]
        lmax, channels = ctx.num_blocks - 1, x.shape[2]
        grad_x = torch.zeros_like(x)
        grad_hidden = torch.empty_like(hidden)
        # Weight gradients are sums over all edges: collected in float32 also when the GEMMs run in bf16.
        grad_radial_weight = torch.zeros_like(radial_weight, dtype=_wide(radial_weight))
        grad_radial_bias = torch.zeros_like(radial_bias, dtype=_wide(radial_bias))
        grad_terms = [torch.zeros_like(w, dtype=_wide(w)) for w in terms]
        ones = [1.0] * len(blocks)
        for part in chunks(len(source), 2 * _bytes_per_edge(x, radial_weight), x.device):
            rotated, radial = _inputs(x, blocks, source, target, hidden, radial_weight, radial_bias, part)
            grad_rotated = torch.empty_like(rotated)
            grad_radial = torch.zeros_like(radial) if ctx.shared_orders else torch.empty_like(radial)
            for m, (w, grad_out, grad_w) in enumerate(zip(terms, grad_outputs, grad_terms, strict=True)):
                row = _order(rotated, lmax, m)
                scale = _radial(radial, rotated, lmax, m, ctx.shared_orders)
                inputs = (row * scale).flatten(2).to(w.dtype)
                grad = grad_out[part].to(w.dtype)
                grad_product = _linear_backward(w, inputs, grad, grad_w).view(row.shape)
                torch.mul(grad_product, scale, out=_order(grad_rotated, lmax, m))
                grad_scale = (grad_product * row).sum(1, keepdim=True)
                view = _radial(grad_radial, rotated, lmax, m, ctx.shared_orders)
                if ctx.shared_orders:
                    view += grad_scale
                else:
                    view.copy_(grad_scale)
            _accumulate(grad_radial_weight, grad_radial.t(), hidden[part])
            grad_radial_bias += grad_radial.sum(0)
            torch.mm(grad_radial, radial_weight, out=grad_hidden[part])
            grad_edges = rotate_from_edges(grad_rotated, [block[part] for block in blocks], ones)
            grad_x.index_add_(0, source[part], grad_edges[:, :, :channels])
            grad_x.index_add_(0, target[part], grad_edges[:, :, channels:])
        return (
            grad_x,
            None,
            None,
            grad_hidden,
            grad_radial_weight.to(radial_weight.dtype),
            grad_radial_bias.to(radial_bias.dtype),
            None,
            None,
            *([None] * len(blocks)),
            *(g.to(w.dtype) for g, w in zip(grad_terms, terms, strict=True)),
        )


def _linear_backward(w: Tensor, inputs: Tensor, grad: Tensor, grad_w: Tensor) -> Tensor:
    """Gradient of the inputs `[e, 1 or 2, in]` of one order; that of the weights is added to `grad_w`."""
    if w.dim() == 2:
        _accumulate(grad_w, grad.t(), inputs[:, 0])
        return torch.mm(grad, w)
    positive, negative = inputs.unbind(1)
    grad_positive, grad_negative = grad.chunk(2, dim=1)
    both = grad_positive + grad_negative
    _accumulate(grad_w[0], both.t(), positive + negative)
    _accumulate(grad_w[1], grad_negative.t(), positive)
    _accumulate(grad_w[2], grad_positive.t(), negative, sign=-1)
    common = torch.mm(both, w[0])
    out = torch.empty_like(inputs)
    torch.addmm(common, grad_negative, w[1], out=out[:, 0])
    torch.addmm(common, grad_positive, w[2], alpha=-1, out=out[:, 1])
    return out


def _inputs(x, blocks, source, target, hidden, radial_weight, radial_bias, part):  # type: ignore[no-untyped-def]
    """Rotated features `[e, R, 2C]` and radial weights `[e, P]` of one chunk of edges."""
    rotated = rotate_to_edges([x[source[part]], x[target[part]]], [block[part] for block in blocks])
    radial = torch.nn.functional.linear(hidden[part], radial_weight, radial_bias)
    return rotated, radial


def _bytes_per_edge(x: Tensor, radial_weight: Tensor) -> int:
    return 4 * (3 * x.shape[1] * 2 * x.shape[2] + 2 * radial_weight.shape[0])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """`total += sign * left @ right`, without a temporary where the precisions allow it."""
    if total.dtype == right.dtype:
        total.addmm_(left, right, alpha=sign)
    else:
        total.add_(torch.mm(left, right), alpha=sign)
