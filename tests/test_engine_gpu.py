"""The GPU's engine step on the CPU, by Triton's interpreter: the same logits and keys as PyTorch's operations.

Triton decides at import whether it interprets, so the comparison runs in a separate process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from helpers.engine_models import build_model, settings

from babydoctor.engine.decoder import Decoder
from babydoctor.engine.gpu.decoder import GpuDecoder, StepTensors, kernels_fit, pad_rows, row_buckets
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.settings import build_kv_cache

assert [row_buckets(n) for n in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]
model = build_model(2, num_heads=4)
language_model = model.language_model
caches = [build_kv_cache(settings(), language_model.config, torch.float32, torch.device("cpu")) for _ in range(2)]
assert kernels_fit(caches[0])
GpuDecoder(language_model, caches[0]).check()
plain, ours = Decoder(language_model, caches[0], pack=False), GpuDecoder(language_model, caches[1])
steps = [
    (DecodeRows([], [], []), [(0, 0, 9, True), (2, 0, 66, False)]),
    (DecodeRows([5], [0], [9]), [(2, 66, 3, True), (3, 0, 1, True)]),
    (DecodeRows([6, 7, 8], [0, 2, 3], [10, 69, 1]), []),
    (DecodeRows([1], [2], [70]), [(1, 0, 3, False)]),
]
with torch.inference_mode():
    for rows, chunks in steps:
        chunks = [Chunk(slot, start, torch.randn(length, 64), final) for slot, start, length, final in chunks]
        expected, got = plain.forward(rows, chunks), ours.forward(rows, chunks)
        assert got.shape == expected.shape, (got.shape, expected.shape)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for name in ("keys", "values"):
        for a, b in zip(getattr(caches[0], name), getattr(caches[1], name)):
            torch.testing.assert_close(a[:4], b[:4], atol=1e-4, rtol=1e-3)
    # A step padded for a graph gives the same logits.
    rows = DecodeRows([1, 2, 3], [0, 2, 3], [11, 71, 2])
    padded = ours.compute_step(StepTensors(*pad_rows(rows, 4, caches[1].scratch).unbind()))[:3]
    torch.testing.assert_close(padded, plain.forward(rows, []), atol=1e-4, rtol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_the_gpu_step_gives_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
