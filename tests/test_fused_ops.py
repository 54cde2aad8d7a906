"""The fused operations give the same numbers in plain PyTorch, compiled by torch, and with Liger's kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fused_values import values_and_gradients
from helpers.packed_models import build_tiny, loss_and_gradients, packed_inputs

from babydoctor.config import LoraConfig
from babydoctor.model.lora import add_lora
from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.model.packed.select_ops import select_ops
from babydoctor.schema import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compiled() -> ElementwiseOps:
    return ElementwiseOps(compiled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, compiled: ElementwiseOps) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for length in (7, 40):  # one kernel for all lengths
        plain, fused = (values_and_gradients(ops, length, dtype) for ops in (PLAIN_OPS, compiled))
        torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)


def test_kernels_do_not_depend_on_the_first_batch() -> None:
    """Bit-equal, because a resumed run starts with a different batch than the run that it continues."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(333, 32, generator=generator).bfloat16() for _ in range(2))
    norm = build_tiny().language_model.model.norm
    results = []
    for first in (2, 90, 333):
        ops = ElementwiseOps(compiled=True)
        ops.swiglu(x[:first], y[:first]), ops.rms_norm(x[:first], norm)
        results.append((ops.swiglu(x, y), ops.rms_norm(x, norm)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_a_step_with_lora_and_dropout(compiled: ElementwiseOps) -> None:
    model = build_tiny()
    add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.3))
    model.train()
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    results = []
    for model.ops in (PLAIN_OPS, compiled):
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, packed_inputs()))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_auto_does_not_compile_small_models() -> None:
    assert select_ops("auto", CPU, 32) is PLAIN_OPS and select_ops(False, CPU, 4096) is PLAIN_OPS
    assert select_ops(True, CPU, 32).compiled and select_ops("auto", CPU, 512).compiled


def test_two_models_in_one_process_use_different_operations() -> None:
    """The choice belongs to a model, not to the process."""
    first, second = build_tiny(), build_tiny()
    first.ops = select_ops(True, CPU, 32)
    assert second.ops is PLAIN_OPS


def test_a_missing_compiler_is_an_error_with_a_fix(tmp_path: Path) -> None:
    program = (
        "import torch; from babydoctor.model.packed.select_ops import select_ops\n"
        "select_ops(True, torch.device('cpu'), 512)"
    )
    nothing = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | nothing, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert UserError.__name__ in last and "train.fuse=true: torch.compile does not work here" in last
    assert "install a C++ compiler" in last


def test_the_error_for_missing_liger_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        select_ops(True, torch.device("cuda"), 4096)
    assert select_ops("auto", torch.device("cuda"), 4096) is PLAIN_OPS


LIGER_PROGRAM = """
import torch, triton
import triton.language as tl
import liger_kernel.ops.rms_norm

@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)

# The interpreter has no libdevice, where Liger finds this function on a GPU.
liger_kernel.ops.rms_norm.rsqrt = rsqrt
from helpers.fused_values import values_and_gradients
from babydoctor.model.packed.fused_ops import PLAIN_OPS
from babydoctor.model.packed.liger_ops import LigerOps
ops = LigerOps(compiled=False)
for length in (7, 40):
    plain, liger = (values_and_gradients(which, length, torch.float32) for which in (PLAIN_OPS, ops))
    torch.testing.assert_close(liger, plain, atol=1e-5, rtol=1e-5)
print("equal")
"""


def test_ligers_kernels_give_the_same_numbers(tmp_path: Path) -> None:
    """On the CPU with Triton's interpreter, which does not support bfloat16. In a separate process, because Triton
    decides at import whether it interprets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path])}
    program = tmp_path / "program.py"
    program.write_text(LIGER_PROGRAM)
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
