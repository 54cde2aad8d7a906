"""NF4: our CPU quantization equals bitsandbytes' bit for bit. Also counts dequantizations in a training step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from babydoctor.config import LoraConfig
from babydoctor.data.layout import HostBatch
from babydoctor.data.packing import build_batch
from babydoctor.model import nf4
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.language_model import load_language_model
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization, dequantized_weight, quantize_linear, quantize_nf4
from babydoctor.model.run_dir import load_run
from babydoctor.schema import Example

bnb = pytest.importorskip("bitsandbytes")


def assert_same_state(weight: torch.Tensor, *, double: bool) -> None:
    ours, state = quantize_nf4(weight, double=double)
    theirs, expected = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    assert torch.equal(ours, theirs) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    mine, reference = state.as_dict(packed=False), expected.as_dict(packed=False)
    assert mine.keys() == reference.keys()
    for key, value in reference.items():
        same = torch.equal(mine[key], value) if isinstance(value, torch.Tensor) else mine[key] == value
        assert same, key
    assert torch.equal(bnb.functional.dequantize_4bit(ours, state), bnb.functional.dequantize_4bit(theirs, expected))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (1376, 512), (7, 64), (3, 22)], ids=str)
def test_quantization_equals_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    """Includes blocks of zeros, tiny values, and partial blocks, which bitsandbytes quantizes."""
    torch.manual_seed(0)
    weight = torch.randn(shape).mul_(0.02)
    weight[0] = 0
    weight[1] *= 1e-36
    weight[2, :8] = 3.0
    assert_same_state(weight.to(dtype), double=double)


def test_ties_are_rounded_as_in_bitsandbytes() -> None:
    """Values exactly on, just below and just above each midpoint between two levels."""
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    midpoints = (levels[:-1] + levels[1:]) / 2
    infinity = torch.tensor(float("inf"))
    values = torch.cat([midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), levels])
    block = torch.cat([values, torch.ones(64 - len(values))]) if len(values) < 64 else values[:64]
    block[-1] = 1.0  # the scale is 1, so that values are compared unscaled
    assert_same_state(block[None].repeat(3, 1), double=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_left_to_bitsandbytes(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 5] = value
    ours, _ = quantize_nf4(weight, double=False)
    theirs, _ = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(ours, theirs)


def test_chunks_and_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 256).bfloat16()
    whole, _ = quantize_nf4(weight, double=True)
    monkeypatch.setattr(nf4, "_CHUNK", 128)
    monkeypatch.setattr(nf4.torch, "get_num_threads", lambda: 3)
    chunked, _ = quantize_nf4(weight, double=True)
    assert torch.equal(whole, chunked)


def test_the_layer_computes_and_saves_like_bitsandbytes() -> None:
    """The layer computes and saves the same as one made by bitsandbytes."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64).mul_(0.02)
    ours = quantize_linear(weight, Quantization())
    theirs = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    x = torch.randn(5, 64)
    assert torch.equal(ours(x), torch.nn.functional.linear(x, dequantized_weight(theirs)))
    saved, expected = ours.state_dict(), theirs.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute_every", [0, 1])
def test_a_training_step_dequantizes_each_weight_once_per_pass(
    tiny_base: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, recompute_every: int
) -> None:
    """Once in the forward pass, once in the backward pass, and once more where the forward pass is recomputed."""
    whole = load_run(tiny_run).model
    language_model = load_language_model(tiny_base / "llama", dtype=torch.float32, quantization=Quantization())
    add_lora(language_model, LoraConfig(r=4, alpha=8, dropout=0.1))
    model = BabyDoctor(whole.vision, whole.projector, language_model).train()
    model.recompute_every = recompute_every
    model.projector.requires_grad_(True)  # every layer's input then has a gradient
    counts: Counter[int] = Counter()
    dequantize = bnb.functional.dequantize_4bit

    def count(packed: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        counts[packed.data_ptr()] += 1
        return dequantize(packed, *args, **options)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", count)
    length, patches = 24, model.num_patches
    image_mask = np.zeros(length, bool)
    image_mask[1 : 1 + patches] = True
    size: Any = model.vision.config.image_size
    ids = np.random.default_rng(0).integers(3, 200, length).astype(np.int32)
    batch = build_batch([Example("one", ids, ids, image_mask, ("image",))])
    model(HostBatch(batch, torch.randn(1, 3, size, size)).to("cpu")).backward()
    config: Any = language_model.config
    assert len(counts) == 7 * config.num_hidden_layers
    assert set(counts.values()) == {3 if recompute_every else 2}
