"""Vision tower and projector as one CUDA graph: for a single image, kernel launches take longer than the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

EncodeImages = Callable[[torch.Tensor], torch.Tensor]
"""``[N, 3, S, S] -> [N, P, D]``."""


class GraphedEncoder:
    """``encode_images`` for inputs of one shape, captured at the first call. Results are copies and may be kept."""

    def __init__(self, encode_images: EncodeImages) -> None:
        self._encode_images = encode_images
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._graph is None:
            self._pixels = pixels.clone()
            self._encode_images(self._pixels)  # the warm-up that PyTorch asks for before a capture
            torch.cuda.synchronize(pixels.device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._features = self._encode_images(self._pixels)
        assert pixels.shape == self._pixels.shape, (pixels.shape, self._pixels.shape)
        self._pixels.copy_(pixels)
        self._graph.replay()
        return self._features.clone()
