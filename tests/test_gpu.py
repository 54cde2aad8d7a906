"""Every CUDA path against the CPU's numbers, on small models. ``BABYDOCTOR_GPU_TESTS_ON=cpu`` rehearses them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_models import build_model as build_engine_model
from helpers.engine_models import build_request, reference, settings, tokenizer, tokens_of  # noqa: F401
from helpers.packed_models import LENGTHS, packed_inputs, reference_attention
from helpers.training import accelerator_on
from torch import nn

from babydoctor.bench.measure import matmul_flops_per_s, memory_bytes_per_s
from babydoctor.bench.models import build_random_model
from babydoctor.bench.train import bench_train, build_stage_model, prepare, run_steps, stage_config
from babydoctor.data.layout import HostBatch, build_attention_layout
from babydoctor.engine.engine import Engine
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.nf4 import Quantization, dequantized_weight, quantize_linear
from babydoctor.model.packed.attention import attend
from babydoctor.model.packed.dense_attention import dense_attention
from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.model.packed.lora_linear import apply_linears, draw_keep_mask
from babydoctor.model.packed.loss import summed_cross_entropy
from babydoctor.plan.hardware import this_device
from babydoctor.schema import IGNORE_INDEX, UserError
from babydoctor.train.optimizer import build_optimizer
from babydoctor.train.step import accumulate_gradients, explain_out_of_memory

pytestmark = pytest.mark.gpu

STAGES = ("align", "instruct", "radiology")


def fused_ops(gpu: str) -> ElementwiseOps:
    if gpu == "cpu":
        return ElementwiseOps(compiled=True)
    pytest.importorskip("liger_kernel")
    from babydoctor.model.packed.liger_ops import LigerOps

    return LigerOps()


@pytest.mark.parametrize("prefix", [0, 21])
@pytest.mark.parametrize("tails", [None, (1, 131, 1, 20, 128, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_and_gradients(gpu: str, dtype: torch.dtype, tails: Any, prefix: int) -> None:
    """The variable-length kernel (bfloat16) and the fallback (float32) against the CPU's blocks in float64."""
    torch.manual_seed(0)
    num_rows = sum(LENGTHS) + prefix if tails is None else sum(tails)
    wide = [torch.randn(n, 4, 64, dtype=torch.float64) for n in (num_rows, *[sum(LENGTHS) + prefix] * 2)]
    wide = [x.to(dtype).double().requires_grad_() for x in wide]
    narrow = [x.detach().to(gpu, dtype).requires_grad_() for x in wide]
    seed = torch.randn(num_rows, 4, 64, dtype=torch.float64).to(dtype)
    expected = attend(*wide, build_attention_layout(LENGTHS, tails, prefix))
    ours = attend(*narrow, build_attention_layout(LENGTHS, tails, prefix, device=gpu))
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(ours, narrow, seed.to(gpu))
    for a, b in zip(gradients, torch.autograd.grad(expected, wide, seed.double()), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, atol=2 * tolerance, rtol=2 * tolerance)


def test_attention_equals_the_definition(gpu: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 4, 64, device=gpu).bfloat16() for _ in range(3))
    ours = attend(q, k, v, build_attention_layout(LENGTHS, device=gpu))
    expected = reference_attention(q.double(), k.double(), v.double(), LENGTHS)
    torch.testing.assert_close(ours.double(), expected, atol=2e-2, rtol=2e-2)


def test_the_towers_attention(gpu: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 257, 64).bfloat16() for _ in range(3))
    with torch.no_grad():
        expected, _ = dense_attention(nn.Identity(), q, k, v, None)
        ours, _ = dense_attention(nn.Identity(), q.to(gpu), k.to(gpu), v.to(gpu), None)
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [7, 1000])
def test_fused_elementwise_operations(gpu: str, length: int, dtype: torch.dtype) -> None:
    from helpers.fused_values import values_and_gradients

    expected = values_and_gradients(PLAIN_OPS, length, dtype)
    ours = values_and_gradients(fused_ops(gpu), length, dtype, device=gpu)
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close([x.cpu() for x in ours], expected, atol=tolerance, rtol=tolerance)


def test_loss_and_gradient(gpu: str) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 64), torch.randn(3000, 64), torch.randint(0, 3000, (50,))
    results = []
    for device in ("cpu", gpu):
        x = hidden.to(device).requires_grad_()
        loss = summed_cross_entropy(x, weight.to(device), targets.to(device))
        results.append([loss.detach().cpu(), torch.autograd.grad(loss, x)[0].cpu()])
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_weights_are_the_same(gpu: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(256, 128).bfloat16()
    layers = [quantize_linear(weight.to(device), Quantization(double)) for device in ("cpu", gpu)]
    expected, ours = (dequantized_weight(layer).cpu().float() for layer in layers)
    # Quantized scales round differently on the two devices, by at most one step of 256.
    torch.testing.assert_close(ours, expected, atol=2e-2 if double else 0, rtol=0)


def test_a_4bit_linear_has_the_products_of_its_weight(gpu: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = quantize_linear(torch.randn(256, 128, device=gpu).bfloat16(), Quantization())
    for rows in (1, 33):
        x = torch.randn(rows, 128, device=gpu).bfloat16().requires_grad_()
        (y,) = apply_linears(x, [layer])
        weight = dequantized_weight(layer).float()
        torch.testing.assert_close(y.float(), x.float() @ weight.T, atol=0.3, rtol=2e-2)
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        torch.testing.assert_close(gradient.float(), weight.sum(0).expand(rows, -1), atol=0.3, rtol=2e-2)


def test_dropout_masks_keep_their_share(gpu: str) -> None:
    keep = draw_keep_mask((1001, 1003), 0.05, torch.device(gpu))
    assert abs(keep.float().mean().item() - 0.95) < 1e-3
    assert keep.dtype == torch.uint8 and set(keep.unique().tolist()) == {0, 1}


def test_image_features(gpu: str) -> None:
    model = build_random_model("mini", "cpu", dtype=torch.float32)
    pixels = torch.randn(2, 3, 224, 224)
    expected = model.encode_images(pixels)
    ours = model.to(gpu).encode_images(pixels.to(gpu))
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-3, rtol=2e-3)


def stage_model(stage: str, device: str, **train: Any) -> tuple[BabyDoctor, Any]:
    """A stage's tiny model in float32 with the same weights on every device, and its configuration."""
    from babydoctor.bench import models

    small = {
        "language": models.PRESETS["mini"]["language"] | {"hidden_size": 64, "intermediate_size": 128}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60},
        "vision": models.PRESETS["mini"]["vision"] | {"hidden_size": 16, "intermediate_size": 32}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28},
    }  # fmt: skip
    models.PRESETS["gpu-test"] = small
    overrides = ["model.dtype=float32", "train.optimizer=adamw", *(f"train.{k}={v}" for k, v in train.items())]
    overrides += ["lora.dropout=0"] if stage != "align" else []
    config = stage_config(stage, "gpu-test", batch_size=4, num_workers=0, overrides=overrides)
    model = build_stage_model(config, "gpu-test", "cpu")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return copy.deepcopy(model).to(device), config


def gradients_of(model: BabyDoctor, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batches = [HostBatch(*packed_inputs((9, 17, 12))), HostBatch(*packed_inputs((31, 8)))]
    data = SimpleNamespace(batches=batches, num_supervised=15)
    loss = accumulate_gradients(model, data, accelerator_on(device))  # type: ignore[arg-type]
    return loss.cpu(), {name: p.grad.cpu() for name, p in model.trainable_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("recompute_every", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_of_a_step(gpu: str, stage: str, recompute_every: int) -> None:
    """In float32, so that the devices agree closely; 4-bit for radiology."""
    if stage == "radiology":
        pytest.importorskip("bitsandbytes")
    (model, _), (ours, _) = stage_model(stage, "cpu", fuse="false"), stage_model(stage, gpu, fuse="false")
    ours.recompute_every = recompute_every
    loss, gradients = gradients_of(model, "cpu")
    our_loss, our_gradients = gradients_of(ours, gpu)
    tolerance = 5e-2 if stage == "radiology" else 1e-3  # scales of 4-bit weights round differently
    torch.testing.assert_close(our_loss, loss, atol=tolerance, rtol=tolerance)
    assert our_gradients.keys() == gradients.keys() and len(gradients) >= 2
    for name, gradient in gradients.items():
        difference = (our_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert difference < tolerance, (name, difference)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_steps_twice_are_bit_equal(gpu: str, stage: str) -> None:
    """Needed for resuming: training from the same state gives the same bits on the same device."""
    if stage == "radiology":
        pytest.importorskip("bitsandbytes")
    results = []
    for _ in range(2):
        model, config = stage_model(stage, gpu, fuse="false")
        optimizer = build_optimizer(model, config.train)
        for _ in range(3):
            gradients_of(model, gpu)
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: p.detach().cpu() for name, p in model.trainable_parameters().items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_real_step_of_the_mini_preset(gpu: str, stage: str) -> None:
    """Loader, packing, bfloat16, dropout, fused operations and the stage's optimizer: the loss is finite and falls."""
    if stage == "radiology":
        pytest.importorskip("bitsandbytes")
    job = prepare(stage, "mini", gpu, hardware=this_device(gpu), batch_size=2, num_workers=0)
    before = {name: p.detach().clone() for name, p in job.model.trainable_parameters().items()}
    assert len(list(run_steps(job, 2))) == 2
    after = job.model.trainable_parameters()
    assert all(torch.isfinite(p).all() for p in after.values())
    assert any(not torch.equal(before[name], p) for name, p in after.items())


@pytest.mark.parametrize("options", [{}, {"step_tokens": 16}, {"cuda_graphs": False}])
@pytest.mark.parametrize("num_heads", [4, 8])  # heads of size 16, which have kernels, and of size 8, which have none
def test_the_engine_gives_the_cpus_tokens(gpu: str, tokenizer: Any, num_heads: int, options: Any) -> None:  # noqa: F811
    requests = [build_request(number, length=5 + 9 * (number % 7)) for number in range(9)]
    expected = [reference(build_engine_model(num_heads=num_heads), request) for request in requests]
    model = build_engine_model(num_heads=num_heads).to(gpu)
    with Engine(model, tokenizer, settings(**options)) as engine:
        assert engine.decoder.has_graphs == (gpu != "cpu" and num_heads == 4 and "cuda_graphs" not in options)
        assert [tokens_of(handle) for handle in [engine.submit(request) for request in requests]] == expected


def test_a_4bit_engine_answers(gpu: str, tokenizer: Any) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    model = build_engine_model()
    for layer in model.language_model.model.layers:
        for name in ("gate_proj", "up_proj"):
            setattr(layer.mlp, name, quantize_linear(getattr(layer.mlp, name).weight.data.to(gpu), Quantization()))
    with Engine(model.to(gpu), tokenizer, settings()) as engine:
        handles = [engine.submit(build_request(seed)) for seed in range(5)]
        assert all(handle.result(60).finish_reason in ("length", "stop") for handle in handles)


def test_memory_stays_under_a_cap(gpu: str) -> None:
    if gpu == "cpu":
        pytest.skip("a memory cap needs a GPU")
    cap = 2 * 2**30
    try:
        ((_, result),) = bench_train(
            ("align",), preset="mini", device=gpu, num_steps=1, batch_size=2, num_workers=0, memory_cap=cap
        )
        assert result.peak_bytes < cap and torch.cuda.max_memory_reserved() <= cap
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_names_the_settings_to_change(gpu: str) -> None:
    config = stage_config("align", "mini", batch_size=2, num_workers=0)
    with (
        pytest.raises(UserError, match=r"out of memory.*train\.micro_batch_tokens=8192"),
        explain_out_of_memory(config.train),
    ):
        if gpu == "cpu":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        torch.empty(2**50, dtype=torch.uint8, device=gpu)


def test_ceilings_are_measured(gpu: str) -> None:
    assert matmul_flops_per_s(gpu, size=512) > 1e9 and memory_bytes_per_s(gpu, size_bytes=2**24) > 1e8


def test_ignored_targets_stay_out_of_the_loss(gpu: str) -> None:
    batch, pixels = packed_inputs((9, 17))
    assert (batch.targets != IGNORE_INDEX).sum() == 6
    packed = HostBatch(batch, pixels).to(gpu)
    assert len(packed.loss_targets) == 6 and packed.loss_targets.device.type == gpu
    assert np.array_equal(packed.input_ids.cpu().numpy(), batch.input_ids)
