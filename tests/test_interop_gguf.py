"""Exports for llama.cpp give the same answers there as the run does here."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_answers import IMAGES, QUESTION, logits_and_greedy, regret
from PIL import Image

from babydoctor.conversation import get_template, render
from babydoctor.data.tokens import encode
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.run_dir import load_run
from babydoctor.schema import Segment, Turn, UserError

WORDS = QUESTION.removeprefix("<image>\n")

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'babydoctor[interop]')")


@pytest.fixture(scope="module")
def run(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    import_llava(golden / "llava-golden-lora", out, image_mode="pad")
    return out


def square(golden: Path, name: str) -> Image.Image:
    """A picture of the tower's size, so that no program resizes it."""
    return load_image(golden / "images" / f"{name}.jpg").resize((56, 56))


def image_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def llama_cpp_chat() -> Iterator[Callable[..., Any]]:
    """``chat(folder, mmproj)`` -> llama.cpp with its own chat template and image code."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed (pip install 'babydoctor[interop]' builds it)"
    )
    from llama_cpp.llama_chat_format import MTMDChatHandler

    opened = []

    def chat(folder: Path, mmproj: str = "mmproj.gguf") -> Any:
        handler = MTMDChatHandler(clip_model_path=str(folder / mmproj), verbose=False, use_gpu=False)
        exact = llama_cpp.GGML_TYPE_F32
        opened.append(
            llama_cpp.Llama(
                str(folder / "model.gguf"),
                chat_handler=handler,
                n_ctx=512,
                n_threads=1,
                verbose=False,
                logits_all=True,
                type_k=exact,
                type_v=exact,
            )
        )
        return opened[-1]

    yield chat
    for model in opened:
        model.close()


def ask(model: Any, image: Image.Image, question: str, num_new: int) -> str:
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image_url(image)}}]
    result = model.create_chat_completion(
        [{"role": "user", "content": parts}], max_tokens=num_new, temperature=0.0, repeat_penalty=1.0
    )
    return result["choices"][0]["message"]["content"]


def as_llama_cpp_orders(model: BabyDoctor, *, moved: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """``encode_images`` with the class token behind the patches and the first patch dropped (llama.cpp issue 25814).

    ``moved``: with the position embeddings of ``mmproj-cls-last.gguf``.
    """
    body: Any = getattr(model.vision, "vision_model", model.vision)
    positions = body.embeddings.position_embedding.weight
    if moved:
        positions = positions.roll(-1, 0)

    @torch.no_grad()
    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        patches = body.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([patches, body.embeddings.class_embedding.expand(len(pixels), 1, -1)], dim=1)
        hidden = body.pre_layrnorm(hidden + positions)
        for layer in body.encoder.layers[:-1]:
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        return model.projector(hidden[:, 1:])

    return encode_images


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("image", IMAGES)
def test_llama_cpp_gives_our_answer(
    run: Path, golden: Path, tmp_path: Path, image: str, dtype: str, llama_cpp_chat: Callable[..., Any]
) -> None:
    """Prompt, picture, tower, projector and language model: the same greedy text, logits within rounding.

    Ours is computed with the class token where llama.cpp puts it, or in its place once llama.cpp is fixed.
    """
    export_run(run, tmp_path / "gguf", format="gguf", dtype=dtype)
    picture = square(golden, image)
    for mmproj, moved in (("mmproj.gguf", False), ("mmproj-cls-last.gguf", True)):
        model = llama_cpp_chat(tmp_path / "gguf", mmproj)
        text = ask(model, picture, WORDS, 13)
        written = model.input_ids[: model.n_tokens].tolist()
        results = []
        for ordered in (False, True):
            loaded = load_run(run)
            if ordered:
                loaded.model.encode_images = as_llama_cpp_orders(loaded.model, moved=moved)
            pixels = torch.from_numpy(to_pixels(picture, loaded.manifest.image))
            logits, _ = logits_and_greedy(loaded, pixels, 1)
            results.append((float(np.abs(model.scores[len(logits) - 1] - logits[-1].numpy()).max()), loaded))
        difference, loaded = min(results, key=lambda result: result[0])
        print(f"{mmproj} {dtype}: logits differ by {difference:.2g}")
        assert difference < 0.01
        # The untrained model is undecided, so each of its tokens must be our best one or equally likely.
        added = written[len(logits) :]
        assert loaded.tokenizer.decode(added, skip_special_tokens=True).strip().startswith(text.strip()[:8])
        regrets = regret(loaded, pixels, added)
        assert max(regrets) < 0.02, regrets


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_of_march_2025_gives_our_answer(
    run: Path, golden: Path, tmp_path: Path, dtype: str, ask_old_llama_cpp: Callable[..., Any]
) -> None:
    """In versions of llama.cpp with the class token in its place, ``mmproj.gguf`` gives this run's answers."""
    export_run(run, tmp_path / "gguf", format="gguf", dtype=dtype)
    for image in IMAGES:
        square(golden, image).save(tmp_path / f"{image}.png")
    answers = ask_old_llama_cpp(tmp_path / "gguf", [(tmp_path / f"{image}.png", WORDS, 13) for image in IMAGES])
    loaded = load_run(run)
    for image, (_, written, logits) in zip(IMAGES, answers, strict=True):
        pixels = torch.from_numpy(to_pixels(square(golden, image), loaded.manifest.image))
        expected, ids = logits_and_greedy(loaded, pixels, 13)
        difference = float(np.abs(np.array(logits) - expected[-1].numpy()).max())
        print(f"{dtype}: logits differ by {difference:.2g}")
        assert difference < (0.001 if dtype == "float32" else 0.01)
        assert written == ids[: len(written)] and len(written) > 10


REPLIES = {"ROCO_00278": "No sign of a mass.", "ROCO_01747": "There is fluid in the left lung."}


@pytest.fixture(scope="module")
def trained(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model, trained on one answer for each picture, so that its answers are certain."""
    from transformers import LlamaForCausalLM

    out = tmp_path_factory.mktemp("runs") / "trained"
    import_llava(golden / "llava-golden-merged", out, image_mode="pad")
    run = load_run(out)
    language_model: Any = LlamaForCausalLM.from_pretrained(str(out / "language_model"), dtype=torch.float32)
    examples = []
    for image, reply in REPLIES.items():
        turns = [Turn("user", QUESTION), Turn("assistant", reply)]
        example = encode(render(turns, get_template("llava_llama_2")), run.tokenizer, 16)
        features = run.model.encode_images(
            torch.from_numpy(to_pixels(square(golden, image), run.manifest.image))[None]
        ).detach()
        examples.append((*(torch.from_numpy(x)[None].long() for x in (example.input_ids, example.labels)), features))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(language_model.parameters(), lr=2e-3)
    for _ in range(60):
        for ids, labels, features in examples:
            embeds = language_model.model.embed_tokens(ids)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, 70:86] = True  # the prompt's 16 image slots
            embeds = embeds.masked_scatter(mask[..., None], features)
            language_model(inputs_embeds=embeds, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    language_model.save_pretrained(str(out / "language_model"))
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "q8_0"])
def test_a_trained_model_answers_the_same_in_llama_cpp(
    trained: Path, golden: Path, tmp_path: Path, dtype: str, llama_cpp_chat: Callable[..., Any]
) -> None:
    export_run(trained, tmp_path / "gguf", format="gguf", dtype=dtype)
    model = llama_cpp_chat(tmp_path / "gguf", "mmproj-cls-last.gguf")
    run = load_run(trained)
    for image, reply in REPLIES.items():
        picture = square(golden, image)
        pixels = torch.from_numpy(to_pixels(picture, run.manifest.image))
        _, ids = logits_and_greedy(run, pixels, 32)
        ours = run.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert ours == reply
        assert ask(model, picture, WORDS, 32).strip() == ours


def test_files_have_the_requested_format(trained: Path, tmp_path: Path) -> None:
    """Block formats if a row consists of whole blocks, 8 bits for embeddings and head, and the chat template."""
    export_run(trained, tmp_path / "gguf", format="gguf", dtype="q4_0")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # 176 is not a multiple of 32
    assert types["output_norm.weight"] == "F32"
    assert "[INST]" in reader.fields["tokenizer.chat_template"].contents()
    with pytest.raises(UserError, match="'q4_k' is not one of"):
        export_run(trained, tmp_path / "other", format="gguf", dtype="q4_k")


def test_tokenizers_of_both_kinds_are_read(trained: Path, tmp_path: Path, llama_cpp_chat: Callable[..., Any]) -> None:
    """tokenizer.json alone, as the tiny preset has it, gives llama.cpp the same ids as tokenizer.model does."""
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    language_model = tmp_path / "run" / "language_model"
    load_run(trained).tokenizer.save_pretrained(str(language_model))
    (language_model / "tokenizer.model").unlink()
    export_run(tmp_path / "run", tmp_path / "gguf", format="gguf")
    run = load_run(trained)
    model = llama_cpp_chat(tmp_path / "gguf")
    for text in ("The left lung shows 12 nodules; größer.", QUESTION, "a  b\n\nc"):
        ours = encode((Segment(text),), run.tokenizer, 16).input_ids.tolist()
        assert model.tokenize(text.encode(), add_bos=True, special=False) == ours
