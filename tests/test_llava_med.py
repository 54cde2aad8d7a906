"""LLaVA-Med 1.5 on Mistral, rebuilt in small: imported, it answers as transformers' Mistral, through every entry."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from helpers.llava_med import write_llava_med
from helpers.serving import data_url, llava_answer, png
from helpers.threaded_worker import serve_worker
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query
from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.interop.llava_source import open_source
from babydoctor.model.run_dir import Run, load_run, read_manifest
from babydoctor.schema import Turn

QUESTION = "Which modality is this?"
NUM_NEW = 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llava_med")
    return folder, write_llava_med(folder)


@pytest.fixture(scope="module")
def run(source: tuple[Path, Any]) -> Path:
    folder = source[0]
    out = folder / "run"
    arguments = ["import", str(folder / "llava-med"), "--vision-tower", str(folder / "clip"), "--out", str(out)]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "mlp2x_gelu" in result.output and "mistral_instruct" in result.output
    return out


@pytest.fixture(scope="module")
def picture() -> bytes:
    return png(3, (60, 60))


@pytest.fixture(scope="module")
def expected(source: tuple[Path, Any], run: Path, picture: bytes) -> str:
    return answer_of_transformers(source[1], load_run(run), picture)


def answer_of_transformers(models: Any, loaded: Run, picture: bytes) -> str:
    """The greedy answer of transformers' own classes, with the ids that LLaVA's code gives the prompt."""
    language_model, tower, projector = models
    tokenizer, image = loaded.tokenizer, loaded.manifest.image
    pixels = torch.from_numpy(to_pixels(load_image(picture), image))[None]
    # tokenizer_image_token: what is before and after the image is encoded separately.
    texts = ("[INST] ", f"\n{QUESTION} [/INST]")
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    with torch.no_grad():
        features = projector(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
        embed = language_model.get_input_embeddings()
        parts = [embed(torch.tensor([[1, *before]])), features, embed(torch.tensor([after]))]
        ids = language_model.generate(
            inputs_embeds=torch.cat(parts, 1),
            attention_mask=torch.ones(1, sum(part.shape[1] for part in parts)),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=0,
        )[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(ids.tolist())) > 3, ids
    return str(text).strip()


def test_the_manifest_says_what_was_imported(run: Path) -> None:
    manifest = read_manifest(run)
    assert (manifest.template, manifest.projector, manifest.image_mode) == ("mistral_instruct", "mlp2x_gelu", "pad")
    assert (manifest.image_size, manifest.max_length) == (42, 2048)
    config = json.loads((run / "language_model" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2 and not any(key.startswith(("mm_", "tune_")) for key in config)


@pytest.mark.parametrize(
    ("changes", "family", "template"),
    [
        ({"model_type": "llava_mistral"}, "mistral", "mistral_instruct"),
        ({"model_type": "llava_qwen"}, "qwen2", "chatml"),
        ({"model_type": "llava_llama"}, "llama", "llava_llama_2"),
    ],
)
def test_family_and_template_follow_from_the_configuration(
    source: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], family: str, template: str
) -> None:
    folder = source[0]
    config = json.loads((folder / "llava-med" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").touch()
    checkpoint = open_source(tmp_path, None, str(folder / "clip"))
    assert (checkpoint.family, checkpoint.template) == (family, template)


def answer_of_the_engine(loaded: Run, picture: bytes) -> str:
    pixels = to_pixels(load_image(picture), loaded.manifest.image)
    with Inference(loaded.model, loaded.tokenizer, loaded.manifest, num_tokens=200) as inference:
        query = Query([Turn("user", f"<image>\n{QUESTION}")], pixels, max_new_tokens=NUM_NEW)
        return inference.answer(query).text


def test_the_engine_answers_as_transformers_does(run: Path, picture: bytes, expected: str) -> None:
    assert answer_of_the_engine(load_run(run), picture) == expected


def test_a_sliding_window_gives_the_answer_of_transformers(picture: bytes, expected: str, tmp_path: Path) -> None:
    """Mistral-7B-Instruct-v0.1's architecture: the window is shorter than the prompt."""
    models = write_llava_med(tmp_path, sliding_window=16)
    import_llava(tmp_path / "llava-med", tmp_path / "run", vision_tower=str(tmp_path / "clip"))
    loaded = load_run(tmp_path / "run")
    assert loaded.model.language_model.config.model_type == "mistral"
    answer = answer_of_the_engine(loaded, picture)
    assert answer == answer_of_transformers(models, loaded, picture) != expected


@pytest.mark.parametrize("format", ["hf", "llava", "gguf"])
def test_exports_carry_the_template(run: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / "out"
    export_run(run, out, format=format, dtype="float32")
    if format == "gguf":
        from gguf import GGUFReader

        fields = GGUFReader(out / "model.gguf").fields
        assert fields["tokenizer.chat_template"].contents().count("[INST] ") > 1
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
        return
    config = json.loads((out / "config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    if format == "hf":
        assert "[/INST]" in (out / "chat_template.jinja").read_text()
        return
    assert (config["model_type"], config["architectures"]) == ("llava_mistral", ["LlavaMistralForCausalLM"])
    assert config["sliding_window"] is None and "llava-mistral" in (out / "README.md").read_text()
    manifest = import_llava(out, tmp_path / "back", vision_tower=str(out / "vision_tower"))
    assert manifest.template == "mistral_instruct"
    before, after = (load_run(path).model.state_dict() for path in (run, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.fixture(scope="module")
def worker(run: Path) -> Iterator[str]:
    with serve_worker(run, "llava-med") as url:
        yield url


def test_openai_chat_and_the_llava_api_give_the_same_answer(worker: str, picture: bytes, expected: str) -> None:
    client = openai.OpenAI(base_url=f"{worker}/v1", api_key="none", max_retries=0)
    parts: Any = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url(picture)}}]
    answer = client.chat.completions.create(
        model="llava-med", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=NUM_NEW
    )
    assert (answer.choices[0].message.content or "").strip() == expected
    conv = requests.post(f"{worker}/worker_get_conv_template", json={"model": "llava-med"}, timeout=60).json()
    assert conv["conv"]["name"] == "mistral_instruct" and conv["conv"]["stop_str"] == "</s>"
    prompt = prompt_text(render_prompt([Turn("user", f"<image>\n{QUESTION}")], get_template("mistral_instruct")))
    assert prompt == f"[INST] <image>\n{QUESTION} [/INST]"
    images = [base64.b64encode(picture).decode()]
    body = {"model": "llava-med", "images": images, "temperature": 0, "max_new_tokens": NUM_NEW, "stop": "</s>"}
    assert llava_answer(worker, body | {"prompt": prompt}).strip() == expected
    assert llava_answer(worker, body | {"prompt": f"<s>{prompt}"}).strip() == expected


def test_the_web_ui_asks_it(worker: str, picture: bytes, expected: str) -> None:
    """The client of the web UI, which reads the template's name from the server and renders the turns."""
    from babydoctor.serve.page.controller_client import ControllerClient
    from babydoctor.serve.page.session import AnswerSettings, Exchange
    from babydoctor.serve.page.viewer.view import View

    async def ask() -> str:
        client = ControllerClient(worker)
        try:
            assert (await client.template("llava-med")).name == "mistral_instruct"
            exchange = Exchange(QUESTION, "llava-med", AnswerSettings(0, 1, NUM_NEW), View(picture, 60, 60, ""))
            async for _ in client.answer(exchange, [Turn("user", f"<image>\n{QUESTION}")]):
                pass
            return exchange.answer.strip()
        finally:
            await client.aclose()

    assert asyncio.run(ask()) == expected
