"""The training forward of the decoder: transformers' numbers, one document at a time or packed, with LoRA or 4-bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.packed_models import (
    LENGTHS,
    build_tiny,
    loss_and_gradients,
    packed_inputs,
    reference_attention,
    tiny_config,
    transformers_loss,
)
from transformers import LlamaConfig, LlamaForCausalLM

from babydoctor.config import LoraConfig
from babydoctor.data.layout import (
    HostBatch,
    SharedKeys,
    _shared_key_arrays,
    build_attention_layout,
    build_spans,
    tail_lengths,
)
from babydoctor.model.language_model import build_language_model, finish_language_model
from babydoctor.model.lora import add_lora
from babydoctor.model.packed.attention import QUERY_BLOCK, _CopyPrefix, attend, span_attention
from babydoctor.model.packed.fused_ops import PLAIN_OPS
from babydoctor.model.packed.lora_linear import apply_linears, draw_keep_mask
from babydoctor.schema import IGNORE_INDEX


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tails", [LENGTHS, (1, 131, 1, 20, 128, 2)])
def test_attention_and_its_gradients_equal_the_definition(kv_heads, tails):
    torch.manual_seed(0)
    q = torch.randn(sum(tails), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(LENGTHS), kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, expected = attend(q, k, v, build_attention_layout(LENGTHS, tails)), reference_attention(q, k, v, tails)
    torch.testing.assert_close(ours, expected)
    seed = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), seed) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert max(LENGTHS) > 2 * QUERY_BLOCK


def test_parts_pass_gradcheck():
    torch.manual_seed(0)
    norm = LlamaForCausalLM(tiny_config()).double().model.norm
    x, y = (torch.randn(6, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    angle = torch.randn(6, 4, dtype=torch.float64)
    cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
    assert torch.autograd.gradcheck(PLAIN_OPS.swiglu, (x, y))
    assert torch.autograd.gradcheck(lambda x: PLAIN_OPS.rotate(x.view(6, 4, 8), cos, sin), (x,))
    # The norm's mean is in float32, so it is compared with autograd through the same formula.
    expected = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
    for a, b in zip(
        torch.autograd.grad(PLAIN_OPS.rms_norm(x, norm), x, y), torch.autograd.grad(expected, x, y), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("values", [{}, {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("with_lora", [False, True])
def test_loss_and_gradients_equal_transformers_layers(values, with_lora):
    model = build_tiny(**values)
    if with_lora:
        add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    loss, gradients = loss_and_gradients(model, packed_inputs())
    model.zero_grad(set_to_none=True)
    expected = transformers_loss(model, packed_inputs())
    expected.backward()
    expected_gradients = {name: p.grad for name, p in model.trainable_parameters().items()}
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == (44 if with_lora else 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("values", [{}, {"num_key_value_heads": 2}])
@pytest.mark.parametrize("recompute_every", [0, 1])
def test_a_shared_prefix_changes_neither_loss_nor_gradients(values, recompute_every):
    """Compare computing a shared prefix once with computing it in each document."""
    model, apart = build_tiny(**values), packed_inputs((149, 157, 152, 157))
    model.recompute_every = recompute_every
    add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prefix, starts = 140, (0, 149, 306, 458)
    apart[0].image_mask[:] = False
    for start in starts:
        for array in (apart[0].input_ids, apart[0].targets):
            array[start : start + prefix] = array[:prefix].copy()
        apart[0].image_mask[start + prefix : start + prefix + 4] = True
        apart[0].targets[start : start + prefix] = IGNORE_INDEX
    kept = np.ones(len(apart[0]), bool)
    for start in starts[1:]:
        kept[start : start + prefix] = False
    arrays = {key: getattr(apart[0], key)[kept] for key in ("input_ids", "image_mask", "targets", "position_ids")}
    shared = (replace(apart[0], **arrays, document_lengths=(9, 17, 12, 17), prefix_length=prefix), apart[1])
    loss, gradients = loss_and_gradients(model, shared)
    expected, expected_gradients = loss_and_gradients(model, apart)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_keys_of_a_shared_prefix_are_copied_for_each_document():
    for queries, expected in ((None, [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6]), ((1, 2), [0, 1, 2, 3, 0, 1, 4, 5, 6])):
        shared = build_attention_layout((2, 3), queries, 2, device="meta").shared
        assert shared is not None and shared.gather.shape == (len(expected),)
        gather, own, copies = _shared_key_arrays(build_spans((2, 3), queries, 2), 2)
        assert gather.tolist() == expected
        assert gather[own].tolist() == [2, 3, 4, 5, 6]
        assert gather[copies].reshape(-1, 2).tolist() == [[0, 1]] * (3 if queries is None else 2)


def test_copying_the_prefix_has_the_gradient_of_indexing():
    arrays = [torch.from_numpy(array).long() for array in _shared_key_arrays(build_spans((2, 3), None, 2), 2)]
    x = torch.randn(7, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _CopyPrefix.apply(x, SharedKeys(*arrays, 2)), (x,))


@pytest.mark.parametrize("tails", [None, (1, 131, 1, 20, 128, 2)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_the_fallback_kernel_equals_the_blocks(tails, prefix):
    torch.manual_seed(0)
    layout = build_attention_layout(LENGTHS, tails, prefix)
    num_rows = sum(LENGTHS) + prefix if tails is None else sum(tails)
    q = torch.randn(num_rows, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(LENGTHS) + prefix, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = [attend(q, k, v, layout), span_attention(q, k, v, layout.spans)]
    torch.testing.assert_close(*results)
    seed = torch.randn_like(results[0])
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), seed) for out in results), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tail_begins_at_the_first_target():
    targets = np.array([-100, 1, -100, -100, 2, 3, -100, -100])
    assert tail_lengths(targets, (3, 3, 2)) == (2, 2, 1)


def test_indices_of_a_micro_batch_on_the_device():
    batch, pixels = packed_inputs((9, 17))
    packed = HostBatch(batch, pixels).to("cpu")
    assert packed.image_index.tolist() == [1, 2, 3, 4, 10, 11, 12, 13]
    assert packed.tail_index.tolist() == [*range(5, 9), *range(22, 26)]
    assert packed.tail_index[packed.loss_index].tolist() == [5, 6, 7, 22, 23, 24]
    assert packed.loss_targets.tolist() == [7] * 6
    assert packed.every.spans == build_spans((9, 17)) and packed.tail.spans == build_spans((9, 17), (4, 4))


def test_recomputing_changes_nothing_with_dropout():
    model = build_tiny()
    add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    results = []
    for model.recompute_every in (0, 1, 2):
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, packed_inputs()))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    keep = draw_keep_mask((1001, 1003), 0.05, torch.device("cpu"))
    assert keep.shape == (1001, 1003) and set(keep.unique().tolist()) == {0, 1}
    assert abs(keep.float().mean().item() - 0.95) < 1e-3
    model = build_tiny()
    add_lora(model.language_model, LoraConfig(r=32, alpha=32, dropout=0.3))
    layer = model.language_model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 32)
    layer.eval()
    (expected,) = apply_linears(x, [layer])
    torch.testing.assert_close(expected, layer(x))
    layer.train()
    mean = torch.stack([apply_linears(x, [layer])[0] for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.2, rtol=0.05)


def test_gradients_through_a_4bit_base():
    pytest.importorskip("bitsandbytes")
    from babydoctor.model.language_model import place_weight
    from babydoctor.model.nf4 import Quantization, dequantized_weight

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
    )
    plain = LlamaForCausalLM(config)
    model = build_language_model(config, torch.float32)
    for name, weight in plain.named_parameters():
        place_weight(model, name, weight.data, Quantization())
    finish_language_model(model, "cpu")
    base = copy.deepcopy(model.model.layers[0].mlp.gate_proj)
    add_lora(model, LoraConfig(r=4, alpha=8, dropout=0.0))
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(7, 64, requires_grad=True)
    (y,) = apply_linears(x, [layer])
    torch.testing.assert_close(y, x @ dequantized_weight(base).float().T, atol=1e-4, rtol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dequantized_weight(base).float().sum(0).expand(7, -1), atol=1e-3, rtol=1e-3)
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
