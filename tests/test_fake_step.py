"""A training step reads no value from the device, so it never waits for the GPU.

Under ``FakeTensorMode`` tensors have shapes and devices but no values: reading one raises, and so does an operation on
tensors of different devices. It needs no GPU, but ``device="cuda"`` needs a torch that is linked with CUDA; there the
forward pass runs, and with a GPU the backward pass too (autograd selects the device, also for fake tensors).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.training import accelerator_on
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from babydoctor.bench.train import SyntheticEncoder, build_stage_model, stage_config, synthetic_samples
from babydoctor.data.loader import StepData, StepDataset
from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.engine.settings import kv_shape
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model import language_model
from babydoctor.train.optimizer import build_optimizer
from babydoctor.train.step import accumulate_gradients, forward

STAGES = ("align", "instruct", "radiology")
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="this torch is not linked with CUDA")
)


def step_data(stage: str) -> StepData:
    """One step of a stage with the lengths of real rows: two micro-batches, images, and a prefix except in align."""
    config = stage_config(stage, "mini", batch_size=6, num_workers=0)
    before, after = (1, 0) if stage == "align" else (76, 5)
    image = ImageSettings(224, "pad", (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    encoder = SyntheticEncoder(32000, image, 256, before, after)
    data = StepDataset(synthetic_samples(6), config.data, config.train, encoder, max_tokens=1400)[0]
    assert len(data.batches) > 1 and any(batch.prefix_length for batch in data.batches) == (stage != "align")
    return data


def fake_quantize(weight: torch.Tensor, quantization: object) -> nn.Module:
    """A 4-bit layer whose packed weight and scales are fake tensors; bitsandbytes itself would run its kernels."""
    from bitsandbytes.functional import QuantState

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    packed = torch.empty(rows * columns // 2, 1, dtype=torch.uint8, device=weight.device)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    absmax = torch.empty(rows * columns // 64, device=weight.device)
    code = torch.empty(16, device=weight.device)
    state = QuantState(absmax, weight.shape, code=code, blocksize=64, quant_type="nf4", dtype=weight.dtype)
    layer.weight.quant_state = state
    return layer


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build modules directly on the device, because ``nn.Module.to`` does not work on fake tensors."""
    for name in ("to", "float"):
        monkeypatch.setattr(nn.Module, name, lambda self, *args, **kwargs: self)
    monkeypatch.setattr(language_model, "quantize_linear", fake_quantize)
    yield


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_training_step_does_not_wait_for_the_device(stage: str, device: str, on_device: None) -> None:
    """Forward, backward, clipping and optimizer of each stage."""
    # NumPy draws dropout masks on the CPU from a seed value, which fake tensors do not have. Nor can they run kernels.
    overrides = ["train.fuse=false"] + (["lora.dropout=0"] if device == "cpu" and stage != "align" else [])
    config = stage_config(stage, "mini", batch_size=6, num_workers=0, overrides=overrides)
    data = step_data(stage)
    rank = accelerator_on(device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = build_stage_model(config, "mini", device)
        assert {p.device.type for p in model.parameters()} == {device}
        model.recompute_every = 2
        if device == "cuda" and not torch.cuda.is_available():
            assert {forward(model, batch, torch.device(device)).device.type for batch in data.batches} == {"cuda"}
            return
        optimizer = build_optimizer(model, config.train)
        loss = accumulate_gradients(model, data, rank)
        norm = rank.clip_grad_norm_(list(model.trainable_parameters().values()), 1.0)
        assert all(p.grad is not None and p.grad.device.type == device for p in model.trainable_parameters().values())
        optimizer.step()
        assert loss.shape == norm.shape == () and loss.device.type == device
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_an_engine_step_does_not_wait_for_the_device(device: str, on_device: None) -> None:
    """Decoding rows and prompt chunks in one step, up to the logits."""
    stage = stage_config("align", "mini", batch_size=1, num_workers=0, overrides=["train.fuse=false"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            model = build_stage_model(stage, "mini", device).language_model
        layers, heads, width = kv_shape(model.config)
        sizes = {"capacity": 64, "num_slots": 4, "max_running": 4}
        kv_cache = KVCache(layers, heads, width, **sizes, dtype=model.dtype, device=torch.device(device))
        decoder = Decoder(model, kv_cache, pack=False)
        embeds = torch.empty(9, model.config.hidden_size, dtype=model.dtype, device=device)
        chunks = [Chunk(1, 0, embeds, True), Chunk(2, 4, embeds, False)]
        for rows in (DecodeRows([], [], []), DecodeRows([5, 6], [0, 3], [9, 20])):
            logits = decoder.forward(rows, chunks)
            assert logits.shape == (len(rows.tokens) + 1, model.config.vocab_size) and logits.device.type == device
