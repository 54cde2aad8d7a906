"""The tiny preset's vision tower: a small CLIP, trained from scratch on the phantoms' captions.

Shapes: ``B`` images, ``P`` patches, ``D`` hidden size, ``E`` size of the shared embedding space, ``C`` captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize, one_hot, pad
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from babydoctor.files import atomic_directory
from babydoctor.phantom.case import Case
from babydoctor.phantom.text import caption
from babydoctor.progress import loss_progress

PROJECTED_LAYER = -2
"""The hidden layer whose patches the projector reads, as in ``model.vision_layer``."""


@dataclass(frozen=True)
class TowerSettings:
    """Sizes and optimizer settings of the tower."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 14
    embed_size: int = 96
    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    max_shift: int = 3
    """Training shifts images by up to this many pixels, because patients are never in exactly the same position."""


@dataclass(frozen=True)
class Tower:
    """A trained tower and its pixel statistics, for values in [0, 1]."""

    model: CLIPVisionModel
    mean: float
    std: float


def load_images(cases: Sequence[Case], folder: Path) -> np.ndarray:
    """Read the cases' images: uint8 ``[N, S, S]``."""
    from PIL import Image

    images = []
    for case in cases:
        with Image.open(folder / case.image) as image:
            images.append(np.asarray(image.convert("L")))
    return np.stack(images)


def caption_pieces(case: Case) -> list[str | None]:
    """A case's whole caption and four pieces of it: modality, finding, side, level. None if a piece does not apply.

    Each piece is a separate positive, because captions on the web describe different aspects of an image. Pieces are
    contrasted with pieces of the same kind only, so the easiest one (the modality) does not dominate.
    """
    whole = caption(case)
    scan, rest = whole.split(" with ", 1)
    if case.finding == "none":
        return [whole, scan, rest, None, None]
    what, _, where = rest.partition(" on the ")
    side, _, level = where.partition(" side ")
    return [whole, scan, what, f"on the {side} side", level]


class _Captions:
    """All pieces as padded word ids for CLIP's text encoder, and the index of each case's piece of each kind."""

    def __init__(self, cases: Sequence[Case]) -> None:
        pieces = [caption_pieces(case) for case in cases]
        texts = sorted({piece for row in pieces for piece in row if piece is not None})
        index: dict[str | None, int] = {text: i for i, text in enumerate(texts)} | {None: -1}
        self.piece_of = torch.tensor([[index[piece] for piece in row] for row in pieces])  # [N, kinds], -1: none
        words = sorted({word for text in texts for word in text.split()})
        self.end = len(words)
        """The end-of-text id. CLIP pools at the largest id."""
        number = {word: i for i, word in enumerate(words)}
        rows = [torch.tensor([number[word] for word in text.split()]) for text in texts]
        self.length = max(len(row) for row in rows) + 1
        self.ids = torch.stack([pad(row, (0, self.length - len(row)), value=self.end) for row in rows])  # [C, L]


def _build_clip(settings: TowerSettings, image_size: int, captions: _Captions) -> CLIPModel:
    config = CLIPConfig(
        projection_dim=settings.embed_size,
        vision_config={
            "hidden_size": settings.hidden_size,
            "intermediate_size": 4 * settings.hidden_size,
            "num_hidden_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
            "image_size": image_size,
            "patch_size": settings.patch_size,
            "projection_dim": settings.embed_size,
        },
        text_config={
            "vocab_size": captions.end + 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": captions.length,
            "bos_token_id": 0,
            "pad_token_id": captions.end,
            "eos_token_id": captions.end,
            "projection_dim": settings.embed_size,
        },
    )
    clip = CLIPModel(config)
    # CLIP's initial scales suit thousands of steps. Larger ones make content and position matter from the first step.
    embeddings = clip.vision_model.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.04)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    return clip


def _shifted(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Shift each image ``[B, S, S]`` by up to ``most`` pixels. The border is repeated."""
    size = images.shape[-1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most)), mode="edge")
    corners = rng.integers(0, 2 * most + 1, (len(images), 2))
    return np.stack([image[y : y + size, x : x + size] for image, (y, x) in zip(padded, corners, strict=True)])


def _contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, pieces: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """InfoNCE in both directions for each kind of piece. Equal captions are positives of each other.

    Args:
        images: ``[B, E]``, unit norm.
        texts: ``[C, E]``, unit norm.
        pieces: ``[B, kinds]``, rows of ``texts``; -1: none.
    """
    similarity = scale.exp() * images @ texts.T
    total = similarity.new_zeros(())
    for kind in range(pieces.shape[1]):
        has = pieces[:, kind] >= 0
        used, target = torch.unique(pieces[has, kind], return_inverse=True)
        logits = similarity[has][:, used]
        positives = one_hot(target, len(used)).to(logits.dtype)
        image_to_text = cross_entropy(logits, target)
        text_to_image = cross_entropy(logits.T, (positives / positives.sum(0)).T)
        total = total + (image_to_text + 0.25 * text_to_image) * (0.5 if kind == 0 else 1.0)
    return total / pieces.shape[1]


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of indices, reshuffled each epoch."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def train_tower(cases: Sequence[Case], images: np.ndarray, settings: TowerSettings, seed: int) -> Tower:
    """Train a CLIP on images ``[N, S, S]`` (uint8) and the cases' captions. Returns its vision encoder.

    Two embeddings of each image are trained. The first is CLIP's (projected class token) plus a linear readout of all
    patches, which gives every patch a direct gradient: with the class token alone, training from scratch takes minutes
    to use patch positions. The second is a readout of each patch of the layer that LLaVA projects, so each patch
    learns to describe the whole image, as in a large CLIP. Both readouts are discarded with the text encoder.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    captions = _Captions(cases)
    clip = _build_clip(settings, images.shape[-1], captions)
    num_patches = (images.shape[-1] // settings.patch_size) ** 2
    readout = nn.Linear(num_patches * settings.hidden_size, settings.embed_size)
    patch_readout = nn.Sequential(
        nn.LayerNorm(settings.hidden_size), nn.Linear(settings.hidden_size, settings.embed_size)
    )
    mean, std = float(images.mean() / 255), float(images.std() / 255)
    parameters = [*clip.parameters(), *readout.parameters(), *patch_readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    batches = _batches(len(images), min(settings.batch_size, len(images)), rng)
    for report in loss_progress("vision tower", settings.num_steps):
        chosen = next(batches)
        pixels = _shifted(images[chosen], settings.max_shift, rng)
        pixel_values = ((torch.from_numpy(pixels) / 255 - mean) / std)[:, None].expand(-1, 3, -1, -1)
        output = clip.vision_model(pixel_values, output_hidden_states=True)
        patches = clip.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
        image_embeds = clip.visual_projection(output.pooler_output) + readout(patches.flatten(1))
        projected = output.hidden_states[PROJECTED_LAYER][:, 1:]
        used, pieces = torch.unique(captions.piece_of[torch.from_numpy(chosen)], return_inverse=True)
        missing = int(used[0] < 0)  # -1 sorts first
        text_embeds = normalize(
            clip.text_projection(clip.text_model(captions.ids[used[missing:]]).pooler_output), dim=-1
        )
        pieces = pieces - missing
        loss = _contrastive_loss(normalize(image_embeds, dim=-1), text_embeds, pieces, clip.logit_scale)
        patch_embeds = normalize(patch_readout(projected).flatten(0, 1), dim=-1)  # [B * P, E]
        patch_pieces = pieces.repeat_interleave(num_patches, dim=0)
        loss = loss + _contrastive_loss(patch_embeds, text_embeds, patch_pieces, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, np.log(100))
        report(loss.item())
    model = CLIPVisionModel(clip.vision_model.config)
    state = clip.vision_model.state_dict()
    # Releases of transformers 5 differ in whether CLIPVisionModel wraps the tower in ``vision_model``.
    getattr(model, "vision_model", model).load_state_dict(state)
    return Tower(model.eval(), mean, std)


def make_tower(
    cases: Sequence[Case], images: Path, out: Path, settings: TowerSettings | None = None, seed: int = 0
) -> None:
    """Train a tower on the cases, whose pictures are in the folder ``images``, and save it in the folder ``out``."""
    tower = train_tower(cases, load_images(cases, images), settings or TowerSettings(), seed)
    with atomic_directory(out) as folder:
        save_tower(tower, folder)


def save_tower(tower: Tower, folder: Path) -> None:
    """Save a tower with CLIP's preprocessor_config.json."""
    size = tower.model.config.image_size
    tower.model.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [tower.mean] * 3,
        "image_std": [tower.std] * 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
