"""A tiny model with a byte tokenizer for the engine, requests to it, and transformers' answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from babydoctor.config import LoraConfig
from babydoctor.engine.request import (
    Delta,
    GenerationRequest,
    ImageInput,
)
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization, quantize_linear

EOS = 0
PATCHES = 4
CONTEXT = 160


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that characters and stop strings span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": EOS, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def build_model(num_kv_heads: int = 2, seed: int = 0, num_heads: int = 8) -> BabyDoctor:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=257,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return BabyDoctor(
        CLIPVisionModel(vision).eval(), torch.nn.Linear(32, 64), LlamaForCausalLM(config).eval()
    ).requires_grad_(False)


def train_in_4_bit(model: BabyDoctor, prefix: str = "model.layers.") -> BabyDoctor:
    """Give a model NF4 layers, where their names begin with ``prefix``, and random LoRAs, as stage 3 leaves it."""
    pytest.importorskip("bitsandbytes")
    for name, module in list(model.language_model.named_modules()):
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear):
            model.language_model.set_submodule(name, quantize_linear(module.weight.detach(), Quantization()))
    add_lora(model.language_model, LoraConfig(r=4, alpha=8))
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def build_request(number: int, num_images: int = 1, length: int = 30, **options) -> GenerationRequest:
    random = np.random.default_rng(number)
    parts, masks, images = [random.integers(1, 257, 5)], [np.zeros(5, bool)], []
    for index in range(num_images):
        parts += [np.zeros(PATCHES, np.int64), random.integers(1, 257, 3)]
        masks += [np.ones(PATCHES, bool), np.zeros(3, bool)]
        pixels = random.standard_normal((3, 28, 28)).astype(np.float32)
        images.append(ImageInput(f"image-{number}-{index}", pixels))
    parts.append(random.integers(1, 257, length))
    masks.append(np.zeros(length, bool))
    options = {"max_new_tokens": 24, "ignore_eos": True} | options
    return GenerationRequest(np.concatenate(parts).astype(np.int32), np.concatenate(masks), tuple(images), **options)


@torch.no_grad()
def reference(model: BabyDoctor, request: GenerationRequest) -> list[int]:
    """Greedy tokens by transformers."""
    ids = torch.from_numpy(request.input_ids.astype(np.int64))[None]
    features = None
    if request.images:
        features = model.encode_images(torch.from_numpy(np.stack([image.pixels for image in request.images])))
    embeds = model.embed(ids, torch.from_numpy(request.image_mask)[None], features)
    output = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None if request.ignore_eos else EOS,
        pad_token_id=EOS,
    )
    return output[0].tolist()


def tokens_of(handle) -> list[int]:
    tokens = []
    for event in handle:
        if isinstance(event, Delta):
            tokens.extend(event.token_ids)
        else:
            assert event.error is None, event.error
    return tokens


def settings(**options) -> EngineSettings:
    return EngineSettings(**({"max_running": 4, "step_tokens": 24} | options))
