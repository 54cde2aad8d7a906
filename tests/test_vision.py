"""The vision tower is read from every published layout of CLIP without messages, and missing weights are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from babydoctor.model.vision import load_vision_tower
from babydoctor.schema import UserError

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole_clip(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, as openai/clip-vit-large-patch14: text tower, projections, and the buffers old releases saved."""
    folder = tmp_path_factory.mktemp("clip")
    vision = CLIPVisionModel.from_pretrained(tiny_base / "clip").config.to_dict()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert any(name.startswith("text_model.") for name in weights) and "logit_scale" in weights
    for half, length in (("text", 77), ("vision", 5)):
        weights[f"{half}_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["tower", "whole", "bin", "shards"])
def test_the_tower_equals_transformers_and_prints_nothing(
    tiny_base: Path, whole_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: str
) -> None:
    folder = tiny_base / "clip" if layout == "tower" else whole_clip
    if layout == "bin":
        shutil.copy2(whole_clip / "config.json", tmp_path)
        torch.save(load_file(whole_clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
        folder = tmp_path
    elif layout == "shards":
        CLIPModel.from_pretrained(whole_clip).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        folder = tmp_path
    expected = CLIPVisionModel.from_pretrained(tiny_base / "clip" if layout == "tower" else whole_clip)
    capfd.readouterr()
    tower = load_vision_tower(folder, dtype=torch.float32)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert tower.config._attn_implementation == expected.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(tower(PIXELS).last_hidden_state, expected.eval()(PIXELS).last_hidden_state)
    assert not any(p.requires_grad or p.is_meta for p in tower.parameters())
    assert not any(b.is_meta for b in tower.buffers())
    assert load_vision_tower(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrong_weights_are_named(whole_clip: Path, tmp_path: Path) -> None:
    def changed(**changes: torch.Tensor | None) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        shutil.copy2(whole_clip / "config.json", folder)
        weights = {**load_file(whole_clip / "model.safetensors"), **changes}
        save_file(
            {name: weight for name, weight in weights.items() if weight is not None}, folder / "model.safetensors"
        )
        return folder

    norm = "vision_model.pre_layrnorm.weight"
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIP vision tower, the first is 'pre_layrnorm\.weight'"):
        load_vision_tower(changed(**{norm: None}), dtype=torch.float32)
    with pytest.raises(UserError, match=r"'vision_model\.pre_layrnorm\.weight' has the shape \(7,\).*requires \(32,\)"):
        load_vision_tower(changed(**{norm: torch.zeros(7)}), dtype=torch.float32)
    with pytest.raises(UserError, match=r"unknown weight 'vision_model\.adapter\.weight'"):
        load_vision_tower(changed(**{"vision_model.adapter.weight": torch.zeros(7)}), dtype=torch.float32)
