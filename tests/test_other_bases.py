"""Mistral, Qwen2 and Qwen3 decoders and SigLIP towers give the numbers of transformers' own implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.engine_models import build_request, reference, settings, tokenizer, tokens_of
from helpers.other_bases import LANGUAGE_CONFIGS, WINDOW, build_base
from helpers.packed_models import packed_inputs, transformers_loss

from babydoctor.config import LoraConfig
from babydoctor.data.layout import HostBatch, build_attention_layout
from babydoctor.engine.engine import Engine
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.families import check_language_config, sliding_window
from babydoctor.model.lora import add_lora
from babydoctor.model.packed.attention import attend, span_attention
from babydoctor.schema import UserError

__all__ = ["tokenizer"]
FAMILIES = list(LANGUAGE_CONFIGS)
LENGTHS = (9, 40, 150, 12)
"""Documents below, at and above the sliding window, and longer than a block of queries."""


@pytest.fixture(scope="session")
def bases() -> dict[str, BabyDoctor]:
    return {family: build_base(family, tower="siglip" if family == "qwen3" else "clip") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_one_document_are_those_of_transformers(bases: dict[str, BabyDoctor], family: str) -> None:
    model = bases[family].language_model
    ids = torch.randint(1, 257, (1, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        hidden = bases[family].decode(model.model.embed_tokens(ids), torch.arange(150)[None], [150])
        expected = model(ids).logits
    assert float((model.lm_head(hidden) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_a_packed_micro_batch(family: str) -> None:
    """Projector and LoRA, with documents that are longer than the sliding window."""
    model = build_base(family)
    model.projector.requires_grad_(True)
    add_lora(model.language_model, LoraConfig(r=2, alpha=4, dropout=0.0))
    torch.manual_seed(1)
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    gradients = []
    inputs = packed_inputs(LENGTHS)
    losses = (model(HostBatch(*inputs).to("cpu")), transformers_loss(model, inputs))
    for loss in losses:
        model.zero_grad()
        loss.backward()
        trained = model.trainable_parameters().items()
        gradients.append({name: p.grad.clone() for name, p in trained if p.grad is not None})
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys() == model.trainable_parameters().keys()
    for name, ours in gradients[0].items():
        expected = gradients[1][name]
        assert float((ours - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max())), name


def test_window_limits_what_a_token_depends_on(bases: dict[str, BabyDoctor]) -> None:
    """Two layers reach back twice the window. Earlier tokens do not affect Mistral, but they affect the others."""
    ids = torch.randint(1, 257, (1, 60), generator=torch.Generator().manual_seed(3))
    for family, is_limited in (("mistral", True), ("qwen2-window", True), ("mistral-v0.2", False)):
        model = bases[family]
        embeds = model.language_model.model.embed_tokens(ids)
        changed = embeds.clone()
        changed[0, : 60 - 2 * WINDOW + 1] += 1
        outputs = [model.decode(x, torch.arange(60)[None], [60])[0, -1] for x in (embeds, changed)]
        assert torch.equal(*outputs) is is_limited, family


def test_window_over_a_shared_prefix() -> None:
    """Every kernel that runs here gives the definition's numbers and gradients."""
    torch.manual_seed(0)
    prefix, lengths, tails = 20, (5, 200, 3), (2, 150, 3)
    layout = build_attention_layout(lengths, tails, prefix)
    query = torch.randn(sum(tails), 2, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(prefix + sum(lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows, first = [], prefix
    for length, tail in zip(lengths, tails, strict=True):
        keys = [*range(prefix), *range(first, first + length)]
        rows += [keys[max(0, end - WINDOW) : end] for end in range(len(keys) - tail + 1, len(keys) + 1)]
        first += length
    seen = torch.zeros(len(query), len(key), dtype=torch.bool)
    for row, keys in enumerate(rows):
        seen[row, keys] = True
    scores = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (query, key, value), seed, retain_graph=True)
    for ours in (attend(query, key, value, layout, WINDOW), span_attention(query, key, value, layout.spans, WINDOW)):
        torch.testing.assert_close(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, (query, key, value), seed), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_writes_the_text_of_transformers(bases: dict[str, BabyDoctor], tokenizer: Any, family: str) -> None:
    """Prompts in chunks, several at once, one with a prefix from an earlier request; all longer than the window."""
    model = bases[family]
    requests = [build_request(number, length=20 + 25 * number) for number in range(4)]
    with Engine(model, tokenizer, settings()) as engine:
        handles = [engine.submit(request) for request in requests]
        answers = [tokens_of(handle) for handle in handles]
        again = tokens_of(engine.submit(requests[2]))
    assert answers == [reference(model, request) for request in requests]
    assert again == answers[2]


@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip_features_are_those_of_transformers(layer: int) -> None:
    model = build_base("qwen3", tower="siglip")
    model.vision_layer = layer
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.vision(pixels, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(model.encode_images(pixels), model.projector(hidden))
    assert hidden.shape[1] == model.num_patches == 4


def test_unsupported_models_are_refused_by_name() -> None:
    from transformers import Gemma2Config, LlamaConfig, MixtralConfig, Phi3Config, Qwen2Config

    for config in (Gemma2Config(), Phi3Config(), MixtralConfig()):
        with pytest.raises(UserError, match=f"is a '{config.model_type}'.*LLaMA, Mistral, Qwen2, Qwen3"):
            check_language_config(config, "base")
    mixed = Qwen2Config(use_sliding_window=True, num_hidden_layers=4, max_window_layers=2)
    with pytest.raises(UserError, match=r"some layers only.*max_window_layers=2"):
        check_language_config(mixed, "base")
    with pytest.raises(UserError, match="hidden_act='gelu'"):
        check_language_config(LlamaConfig(hidden_act="gelu"), "base")
    windows = [sliding_window(config) for config in LANGUAGE_CONFIGS.values()]
    assert windows == [WINDOW, None, None, None, WINDOW, None]
    assert sliding_window(Qwen2Config()) is None
