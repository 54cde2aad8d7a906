"""Imported checkpoints of the original LLaVA code give its features, logits and answers."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_answers import IMAGES, logits_and_greedy
from safetensors.torch import load_file, save_file

from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import UserError

LAYOUTS = {
    "llava-pretrain": "projector_only",
    "llava-golden-lora": "lora",
    "llava-golden-merged": "lora",
    "llava-golden-merged-bin": "lora",
}


@pytest.fixture(scope="module", params=LAYOUTS)
def imported(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    out = tmp_path_factory.mktemp("runs") / request.param
    import_llava(golden / request.param, out)
    return request.param, load_run(out)


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("image", IMAGES)
def test_imported_run_equals_the_original(
    imported: tuple[str, Run], golden: Path, image: str, mode: str, record_property: pytest.Function
) -> None:
    layout, run = imported
    reference = np.load(golden / "expected" / "reference.npz")
    kind = LAYOUTS[layout]
    settings = type(run.manifest.image)(**{**vars(run.manifest.image), "mode": mode})
    pixels = torch.from_numpy(to_pixels(load_image(golden / "images" / f"{image}.jpg"), settings))
    key = next(k for k in reference if k.startswith(f"features/{kind}/") and image in k and mode in k)
    tail = key.removeprefix(f"features/{kind}/")
    features = run.model.encode_images(pixels[None])[0].numpy()
    np.testing.assert_allclose(features, reference[key], atol=1e-4)
    # transformers 4.37 puts a begin-of-sequence id before what it generates from embeddings.
    greedy_reference = reference[f"greedy/{kind}/{tail}"].tolist()[1:]
    logits, greedy = logits_and_greedy(run, pixels, len(greedy_reference))
    np.testing.assert_allclose(logits[-24:].numpy(), reference[f"logits/{kind}/{tail}"], atol=1e-4)
    assert greedy == greedy_reference
    record_property("difference", float(np.abs(logits[-24:].numpy() - reference[f"logits/{kind}/{tail}"]).max()))


@pytest.fixture
def damaged(golden: Path, tmp_path: Path) -> Path:
    """A copy of the golden checkpoints to break."""
    shutil.copytree(golden, tmp_path / "golden", ignore=shutil.ignore_patterns("expected", "images"))
    return tmp_path / "golden"


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"model_type": "llava_gemma"}, "llava_gemma"),
        ({"text_config": {}}, "transformers"),
        ({"mm_projector_type": "resampler"}, "resampler"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_tower": "../nowhere"}, "--vision-tower"),
        ({"_name_or_path": "../nowhere"}, "--base"),
    ],
)
def test_unsupported_models_are_named(damaged: Path, values: dict[str, object], named: str) -> None:
    change_config(damaged / "llava-pretrain", **values)
    with pytest.raises(UserError, match=named):
        import_llava(damaged / "llava-pretrain", damaged / "out")
    assert not (damaged / "out").exists()


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_a_pickle_with_more_than_tensors_is_refused(damaged: Path) -> None:
    (damaged / "llava-pretrain" / "mm_projector.bin").write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(UserError, match="could run code"):
        import_llava(damaged / "llava-pretrain", damaged / "out")


def test_a_bin_file_of_the_old_format_is_read(damaged: Path) -> None:
    path = damaged / "llava-pretrain" / "mm_projector.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    import_llava(damaged / "llava-pretrain", damaged / "out")


def test_unknown_weights_and_wrong_shapes_are_named(damaged: Path) -> None:
    merged = damaged / "llava-golden-merged" / "model.safetensors"
    weights = load_file(merged)
    save_file({**weights, "model.image_newline": torch.zeros(64)}, merged)
    with pytest.raises(UserError, match=r"model\.image_newline"):
        import_llava(merged.parent, damaged / "out")
    save_file({**weights, "model.norm.weight": torch.zeros(65)}, merged)
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has the shape \(65,\).*\(64,\)"):
        import_llava(merged.parent, damaged / "out")
    del weights["lm_head.weight"]
    save_file(weights, merged)
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is 'lm_head\.weight'"):
        import_llava(merged.parent, damaged / "out")

    projector = damaged / "llava-pretrain" / "mm_projector.bin"
    torch.save(
        {"model.mm_projector.weight": torch.zeros(64, 31), "model.mm_projector.bias": torch.zeros(64)}, projector
    )
    with pytest.raises(UserError, match=r"'weight' is \(64, 31\).*\(64, 32\)"):
        import_llava(projector.parent, damaged / "out")
    adapter = damaged / "llava-golden-lora" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({**load_file(adapter), name: torch.zeros(3, 8)}, adapter)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*does not fit \(176, 64\)"):
        import_llava(adapter.parent, damaged / "out")
    assert not (damaged / "out").exists()


def test_mlp_projector_of_llava_1_5(damaged: Path) -> None:
    source = damaged / "llava-pretrain"
    change_config(source, mm_projector_type="mlp2x_gelu")
    first, second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 64)
    layers = {"0": first, "2": second}
    weights = {
        f"model.mm_projector.{index}.{part}": getattr(layer, part).data
        for index, layer in layers.items()
        for part in ("weight", "bias")
    }
    torch.save(weights, source / "mm_projector.bin")
    import_llava(source, damaged / "out", template="v1")
    run = load_run(damaged / "out")
    x = torch.randn(3, 32)
    assert torch.equal(run.model.projector(x), second(torch.nn.functional.gelu(first(x))))


def test_base_and_tower_can_be_named(damaged: Path) -> None:
    change_config(damaged / "llava-golden-lora", _name_or_path="elsewhere/a/b", mm_vision_tower="elsewhere/c/d")
    manifest = import_llava(
        damaged / "llava-golden-lora", damaged / "out", base=str(damaged / "base"), vision_tower=str(damaged / "clip")
    )
    assert manifest.language_model == str(damaged / "base")
    adapter = json.loads((damaged / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(damaged / "base")


def test_imported_adapter_loads_with_plain_peft(golden: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    import_llava(golden / "llava-golden-lora", tmp_path / "out")
    run = load_run(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(str(golden / "base"), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = run.model.language_model.lm_head(
            run.model.decode(run.model.language_model.model.embed_tokens(ids), torch.arange(37)[None], (37,))
        )
        torch.testing.assert_close(model(ids).logits, ours, atol=1e-4, rtol=0)
