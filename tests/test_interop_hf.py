"""Exports for transformers give the run's answers in stock transformers, without our code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.chat_tokenizers import llama_3_tokenizer, qwen_2_tokenizer, with_tokenizer
from helpers.golden_answers import IMAGES, QUESTION, logits_and_greedy
from PIL import Image

from babydoctor.conversation import TEMPLATES, get_template, render, render_prompt
from babydoctor.data.tokens import encode
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.schema import Turn, UserError

TOKENIZERS = {"llama_3": llama_3_tokenizer, "chatml": qwen_2_tokenizer}
"""Templates that the golden base's tokenizer has no tokens for."""

WORDS = QUESTION.removeprefix("<image>\n")


@pytest.fixture(scope="module")
def exports(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the golden LoRA in both image modes, and its exports."""
    folder = tmp_path_factory.mktemp("exports")
    for mode in ("square", "pad"):
        import_llava(golden / "llava-golden-lora", folder / f"run-{mode}", image_mode=mode)
        export_run(folder / f"run-{mode}", folder / f"hf-{mode}", format="hf")
    return folder


def chat(image: Path | str, *more: tuple[str, str]) -> list[dict[str, object]]:
    parts = [{"type": "text", "text": WORDS}, {"type": "image", "path": str(image)}]
    return [{"role": "user", "content": parts}, *({"role": role, "content": text} for role, text in more)]


def load_exported(folder: Path, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(str(folder), dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), AutoProcessor.from_pretrained(str(folder))


@pytest.mark.parametrize("mode", ["square", "pad"])
@pytest.mark.parametrize("image", IMAGES)
def test_stock_transformers_gives_our_logits_and_answers(exports: Path, golden: Path, image: str, mode: str) -> None:
    run = load_run(exports / f"run-{mode}")
    model, processor = load_exported(exports / f"hf-{mode}")
    path = golden / "images" / f"{image}.jpg"
    pixels = torch.from_numpy(to_pixels(load_image(path), run.manifest.image))
    inputs = processor.apply_chat_template(
        chat(path), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), pixels.numpy(), atol=1e-5)
    expected, greedy = logits_and_greedy(run, pixels, 13)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        generated = model.generate(**inputs, max_new_tokens=13, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    vocabulary = expected.shape[1]
    torch.testing.assert_close(logits[:, :vocabulary], expected, atol=1e-4, rtol=0)
    assert model.config.image_token_index == vocabulary == logits.shape[1] - 1
    assert generated.tolist() == greedy
    text = run.tokenizer.decode(greedy, skip_special_tokens=True)
    assert processor.decode(generated, skip_special_tokens=True) == text


def test_bfloat16_differs_by_rounding_only(exports: Path, golden: Path) -> None:
    """The pair of GELUs adds no more error than rounding the model to bfloat16."""
    run = load_run(exports / "run-pad")
    model, processor = load_exported(exports / "hf-pad", torch.bfloat16)
    path = golden / "images" / f"{IMAGES[0]}.jpg"
    inputs = processor.apply_chat_template(
        chat(path), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        exact = run.model.encode_images(pixels)[0]
        ours = load_run(exports / "run-pad", dtype=torch.bfloat16).model.encode_images(pixels)[0].float()
        theirs = model.model.get_image_features(pixels.bfloat16()).pooler_output[0].float()
    assert (theirs - exact).abs().max() < 2 * (ours - exact).abs().max()


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_chat_template_gives_our_ids(exports: Path, tmp_path: Path, name: str) -> None:
    """Image before or after the text, system prompts, several turns: the ids equal those of training."""
    from transformers import AutoProcessor

    manifest = read_manifest(exports / "run-square").model_copy(update={"template": name})
    if name in TOKENIZERS:
        base = with_tokenizer(Path(manifest.language_model), TOKENIZERS[name](), tmp_path / "base")
        manifest = manifest.model_copy(update={"language_model": str(base)})
    run = tmp_path / "run"
    run.mkdir()
    for file in (exports / "run-square").iterdir():
        (run / file.name).symlink_to(file) if file.name != "manifest.json" else None
    write_manifest(run, manifest)
    export_run(run, tmp_path / "hf", format="hf")
    processor = AutoProcessor.from_pretrained(str(tmp_path / "hf"))
    tokenizer = load_run(run).tokenizer
    image = Image.new("RGB", (56, 56))
    user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": WORDS}]}
    later = [("assistant", "No acute finding."), ("user", "Are you sure? Say why.")]
    conversations: list[tuple[list[dict[str, object]], list[Turn], str | None]] = [
        ([user], [Turn("user", QUESTION)], None)
    ]
    if get_template(name).keeps_user_text:
        turns = [Turn("user", QUESTION), *(Turn(role, text) for role, text in later)]  # type: ignore[arg-type]
        messages = [user, *({"role": role, "content": text} for role, text in later)]
        system = {"role": "system", "content": "Be brief."}
        text_only = [{"role": "user", "content": "What is a CT?"}]
        conversations += [
            (messages, turns, None),
            ([system, *messages], turns, "Be brief."),
            (text_only, [Turn("user", "What is a CT?")], None),
        ]
        finished = [*turns, Turn("assistant", "Yes.")]
    image_id = processor.image_token_id
    if get_template(name).end_tokens:
        ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
        stop = tokenizer.convert_tokens_to_ids(get_template(name).stop)
        assert stop == (ends[0] if isinstance(ends, list) else ends)
    for messages, turns, system_prompt in conversations:
        ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        example = encode(render_prompt(turns, get_template(name), system=system_prompt), tokenizer, 16)
        ours = np.where(example.image_mask, image_id, example.input_ids).tolist()
        assert ids["input_ids"][0] == ours
    if get_template(name).keeps_user_text:
        answered = [user, *({"role": turn.role, "content": turn.text} for turn in finished[1:])]
        ids = processor.apply_chat_template(answered, tokenize=True, return_dict=True)
        trained = encode(render(finished, get_template(name)), tokenizer, 16)
        assert ids["input_ids"][0] == np.where(trained.image_mask, image_id, trained.input_ids).tolist()


def test_published_names_and_files(exports: Path) -> None:
    """The names of llava-hf/llava-1.5-7b-hf, which vLLM and SGLang map to their own."""
    from safetensors import safe_open

    with safe_open(exports / "hf-pad" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } <= names
    assert all(
        name.startswith(("language_model.", "vision_tower.vision_model.", "multi_modal_projector.")) for name in names
    )
    config = json.loads((exports / "hf-pad" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (16, -2)


def test_a_hidden_size_that_is_too_small_is_named(exports: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = tmp_path / "run"
    run.mkdir()
    for file in (exports / "run-square").iterdir():
        (run / file.name).symlink_to(file) if file.name != "projector.safetensors" else None
    save_file({"weight": torch.zeros(64, 48), "bias": torch.zeros(64)}, run / "projector.safetensors")
    with pytest.raises(UserError, match=r"text width \(64\).*vision width \(48\).*mlp2x_gelu"):
        export_run(run, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()
