"""Summed next-token loss at supervised positions only, without holding all logits.

Shapes: ``M`` supervised positions, ``D`` text width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 256 * 2**20
"""Most memory that the float32 logits of one chunk may take."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a frozen output layer, summed over positions.

    The gradient with respect to the hidden states is computed in the forward pass while a chunk's logits are at
    hand, so nothing of size ``M x V`` is kept or computed twice. The output layer gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()
            log_norm = torch.logsumexp(logits, dim=-1)
            total += (log_norm - logits.gather(1, targets[part, None])[:, 0]).sum()
            if grad is not None:
                probabilities = logits.sub_(log_norm[:, None]).exp_()
                probabilities.scatter_add_(1, targets[part, None], probabilities.new_full((len(log_norm), 1), -1.0))
                grad[part] = probabilities.to(weight.dtype) @ weight
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
        hidden: ``[M, D]``, the positions that have a target.
        weight: ``[V, D]``, frozen.
        targets: ``[M]`` int64.
    """
    chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    assert not weight.requires_grad, "lm_head is frozen in every stage"
    return _ChunkedCrossEntropy.apply(hidden.to(weight.dtype), weight, targets, chunk)
