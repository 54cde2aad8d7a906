"""The elementwise chains say the same as compiled kernels as one operation after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_decoder import build_tiny, loss_and_gradients, packed_inputs

from babydoctor.config import LoraConfig, TrainConfig
from babydoctor.model.lora import add_lora
from babydoctor.model.packed import fused_ops
from babydoctor.model.packed.fused_ops import fuse, rms_norm, rotate, swiglu
from babydoctor.schema import UserError
from babydoctor.train.fusing import set_fusing


@pytest.fixture
def both_ways() -> Iterator[Callable[[Callable[[], object]], tuple[object, object]]]:
    """Run a function plainly and fused."""

    def run(function: Callable[[], object]) -> tuple[object, object]:
        fuse(False)
        plain = function()
        fuse()
        return plain, function()

    yield run
    fuse(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, both_ways) -> None:
    norm = build_tiny().language_model.model.norm
    for length in (7, 40):  # one kernel for all lengths
        generator = torch.Generator().manual_seed(length)
        x, y, seed = (torch.randn(length, 32, generator=generator).to(dtype).requires_grad_() for _ in range(3))
        angle = torch.rand(length, 4, generator=generator)
        cos, sin = (f(torch.cat((angle, angle), -1)).to(dtype) for f in (torch.cos, torch.sin))

        def values(x=x, y=y, seed=seed, cos=cos, sin=sin) -> list[torch.Tensor]:
            outputs = [swiglu(x, y), rms_norm(x, norm), rotate(x.view(-1, 4, 8), cos, sin).flatten(1)]
            return [*outputs, *torch.autograd.grad(outputs, (x, y), [seed.detach()] * 3)]

        plain, fused = both_ways(values)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)


def test_kernels_do_not_depend_on_what_came_first(both_ways) -> None:
    """To the last bit: a resumed run begins with another batch than the run that it continues."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(333, 32, generator=generator).bfloat16() for _ in range(2))
    norm = build_tiny().language_model.model.norm
    results = []
    for first in (2, 90, 333):
        for chain in vars(fused_ops).values():
            if isinstance(chain, fused_ops._Chain):
                chain.kernels.clear()
        fuse()
        swiglu(x[:first], y[:first]), rms_norm(x[:first], norm)
        results.append((swiglu(x, y), rms_norm(x, norm)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_a_step_with_lora_and_dropout(both_ways) -> None:
    model = build_tiny()
    add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.3))
    model.train()
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def step() -> object:
        torch.manual_seed(3)
        return loss_and_gradients(model, packed_inputs())

    plain, fused = both_ways(step)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)


def test_auto_leaves_small_models_alone(both_ways) -> None:
    set_fusing(TrainConfig(), build_tiny())
    assert not fused_ops._state["fused"]
    set_fusing(TrainConfig(fuse=True), build_tiny())
    assert fused_ops._state["fused"]


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    program = (
        "from babydoctor.config import TrainConfig; from test_decoder import build_tiny\n"
        "from babydoctor.train.fusing import set_fusing\n"
        "set_fusing(TrainConfig(fuse=True), build_tiny())"
    )
    nothing = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment = os.environ | nothing | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert UserError.__name__ in last and "train.fuse=true: torch.compile does not work here" in last
    assert "install a C++ compiler" in last
