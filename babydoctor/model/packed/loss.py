"""Summed next-token loss at the loss positions, without keeping all logits.

Shapes: ``M`` loss positions, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
"""Largest size of the float32 logits of one chunk. On a CPU they should fit in the cache, but with fewer than 128 rows
of a vocabulary of 32,000 the matrix products become slow. A GPU needs large products."""


def chunk_rows(vocabulary: int, *, is_cuda: bool) -> int:
    """Number of positions whose logits are computed at once."""
    return max(1, CHUNK_BYTES["cuda" if is_cuda else "cpu"] // (4 * vocabulary))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a frozen output layer, summed over positions.

    The gradient of the hidden states is computed in the forward pass, while the logits of a chunk exist. So nothing of
    size ``M x V`` is kept or computed twice. The output layer gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Allocated once for all chunks, because page faults of new tensors would cost the CPU more than the arithmetic.
        size = (min(chunk, len(targets)), len(weight))
        narrow = torch.empty(size, dtype=hidden.dtype, device=hidden.device)
        wide, log_wide = (torch.empty(size, dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            target = targets[part, None]
            logits, logits_f32, log_p = (buffer[: len(target)] for buffer in (narrow, wide, log_wide))
            torch.mm(hidden[part], weight.T, out=logits)
            torch.log_softmax(logits_f32.copy_(logits), dim=-1, out=log_p)
            total -= log_p.gather(1, target).sum()
            if grad is not None:
                probabilities = log_p.exp_()
                probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
                torch.mm(logits.copy_(probabilities), weight, out=grad[part])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None


def summed_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of ``-log softmax(hidden @ weight.T)[target]`` over positions, float32.

    Args:
        hidden: ``[M, D]``, the hidden states at the loss positions.
        weight: ``[V, D]``, frozen.
        targets: ``[M]`` int64.
    """
    chunk = chunk_rows(len(weight), is_cuda=hidden.is_cuda)
    assert not weight.requires_grad, "lm_head is frozen in every stage"
    return _ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, targets, chunk)
