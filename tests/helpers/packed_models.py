"""Tiny models and packed inputs for the training forward, with the definition of attention."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from babydoctor.data.layout import HostBatch
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import IGNORE_INDEX, Batch

Inputs = tuple[Batch, torch.Tensor]
LENGTHS = (5, 300, 1, 129, 128, 40)


def reference_attention(q, k, v, query_lengths):
    outputs, first_row, first_key = [], 0, 0
    groups = q.shape[1] // k.shape[1]
    for length, asking in zip(LENGTHS, query_lengths, strict=True):
        a = q[first_row : first_row + asking].transpose(0, 1)
        b, c = (x[first_key : first_key + length].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        scores = a @ b.transpose(1, 2) / q.shape[-1] ** 0.5
        allowed = torch.arange(length)[None] <= torch.arange(length - asking, length)[:, None]
        outputs.append((scores.masked_fill(~allowed.to(q.device), -torch.inf).softmax(-1) @ c).transpose(0, 1))
        first_row, first_key = first_row + asking, first_key + length
    return torch.cat(outputs)


def tiny_config(**values) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=60, **values
    )


def build_tiny(dtype=torch.float32, **values) -> BabyDoctor:
    torch.manual_seed(0)
    config = tiny_config(**values)
    language_model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    tower = CLIPVisionModel(vision).to(dtype).requires_grad_(False).eval()
    return BabyDoctor(tower, torch.nn.Linear(16, 32), language_model)


def packed_inputs(lengths=(9, 17, 12)) -> Inputs:
    """Documents, each with an image in tokens 1 to 4 and three targets at the end."""
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    image_mask, targets = np.zeros(total, bool), np.full(total, IGNORE_INDEX, np.int32)
    start = 0
    for length in lengths:
        image_mask[start + 1 : start + 5] = True
        targets[start + length - 4 : start + length - 1] = 7
        start += length
    batch = Batch(
        input_ids=torch.randint(3, 60, (total,), generator=generator, dtype=torch.int32).numpy(),
        targets=targets,
        position_ids=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        image_mask=image_mask,
        document_lengths=tuple(lengths),
        ids=tuple(str(index) for index in range(len(lengths))),
    )
    return batch, torch.randn(len(lengths), 3, 28, 28, generator=generator)


def loss_and_gradients(model: BabyDoctor, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(HostBatch(*inputs).to("cpu"))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.trainable_parameters().items()}


def transformers_loss(model: BabyDoctor, inputs: Inputs) -> torch.Tensor:
    """The summed loss with transformers' own model and peft's layers, one document at a time."""
    batch, pixels = inputs
    total, start = torch.zeros(()), 0
    for index, length in enumerate(batch.document_lengths):
        part = slice(start, start + length)
        ids, mask = (torch.from_numpy(x[part])[None] for x in (batch.input_ids, batch.image_mask))
        embeds = model.embed(ids.long(), mask, model.encode_images(pixels[index : index + 1]))
        logits = model.language_model(inputs_embeds=embeds).logits[0]
        total = total + cross_entropy(logits, torch.from_numpy(batch.targets[part]).long(), reduction="sum")
        start += length
    return total
