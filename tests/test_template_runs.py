"""Runs on a base with LLaMA-3's tokenizer: refused in a wrong template, trained and served in the right one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from helpers.chat_tokenizers import llama_3_tokenizer, qwen_2_tokenizer, with_tokenizer
from helpers.serving import llava_stream
from helpers.threaded_worker import serve_worker
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.config import build_config, dump_config
from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.inference import Inference, Query
from babydoctor.interop.export import export_run
from babydoctor.model.merge import merge_run
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.schema import Turn, UserError
from babydoctor.train.loop import train

REFUSAL = "no token </s> that template llava_llama_2 ends answers with; .*llama_3"
QUESTION, ANSWER = "Which side?", "The left lung."


@pytest.fixture(scope="module")
def settings(
    tiny_base: Path, tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A stage on the tiny LLaMA with LLaMA-3's kind of tokenizer, which learns one answer."""
    folder = tmp_path_factory.mktemp("llama_3")
    base = with_tokenizer(tiny_base / "llama", llama_3_tokenizer(280), folder / "base")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    (folder / "rows.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(4)]))
    return tiny_settings | {
        "output_dir": str(folder / "run"),
        "model": tiny_settings["model"] | {"language_model": str(base)},
        "data": {"rows": [str(folder / "rows.json")], "max_length": 256, "num_workers": 0, "template": "llama_3"},
        "lora": {"r": 32, "alpha": 64, "dropout": 0.0},
        "train": tiny_settings["train"]
        | {"max_steps": 24, "learning_rate": 6e-3, "schedule": "constant", "save_every": 0, "epochs": 40},
    }


@pytest.fixture(scope="module")
def run(settings: dict[str, Any]) -> Path:
    return train(build_config(settings))


def copy_run(run: Path, folder: Path, **changes: str) -> Path:
    """The run with another manifest."""
    folder.mkdir()
    for file in run.iterdir():
        if file.name != "manifest.json":
            (folder / file.name).symlink_to(file)
    write_manifest(folder, read_manifest(run).model_copy(update=changes))
    return folder


def wrong(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return settings | {"data": settings["data"] | {"template": "llava_llama_2"}, "output_dir": str(folder / "run")}


def test_training_in_a_template_without_its_tokens_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSAL):
        train(build_config(wrong(settings, tmp_path)))


def test_a_run_in_a_template_without_its_tokens_is_not_loaded(run: Path, tmp_path: Path) -> None:
    """Earlier releases trained such runs in silence."""
    with pytest.raises(UserError, match=REFUSAL):
        load_run(copy_run(run, tmp_path / "run", template="llava_llama_2"))


def test_it_learns_to_end_its_answer_with_the_templates_token(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.tokenizer.eos_token == "<|end_of_text|>"  # it is the template that names <|eot_id|>
    with Inference(loaded.model, loaded.tokenizer, loaded.manifest, num_tokens=300) as inference:
        answer = inference.answer(Query([Turn("user", QUESTION)], max_new_tokens=40))
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")


def test_the_bases_own_end_tokens_end_an_answer_too(run: Path, tmp_path: Path) -> None:
    """LLaMA-3 names a list in ``generation_config.json``, which its ``config.json`` lacks; a merged run keeps it."""
    loaded = load_run(run)
    base = with_tokenizer(Path(loaded.manifest.language_model), loaded.tokenizer, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    source = copy_run(run, tmp_path / "run", language_model=str(base))
    named = [loaded.tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    merge_run(source, tmp_path / "merged")
    for path in (source, tmp_path / "merged"):
        again = load_run(path)
        inference = Inference(again.model, again.tokenizer, again.manifest, num_tokens=64)
        assert sorted(inference.engine.eos) == [7, 8, *named]


@pytest.fixture(scope="module")
def worker(run: Path) -> Iterator[str]:
    with serve_worker(run, "llama-3") as url:
        yield url


def test_served_streams_end_before_the_end_token(worker: str) -> None:
    client = openai.OpenAI(base_url=f"{worker}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": QUESTION}]
    chunks = list(client.chat.completions.create(model="llama-3", messages=messages, temperature=0, stream=True))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces).strip() == ANSWER and len([piece for piece in pieces if piece]) > 3
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    conv = requests.post(f"{worker}/worker_get_conv_template", json={"model": "llama-3"}, timeout=60).json()["conv"]
    assert (conv["name"], conv["stop_str"]) == ("llama_3", "<|eot_id|>")
    # Without a stop string: the token itself ends the answer, and its name is never shown.
    prompt = prompt_text(render_prompt([Turn("user", QUESTION)], get_template("llama_3")))
    for begin in ("", "<|begin_of_text|>"):
        body = {"model": "llama-3", "prompt": begin + prompt, "temperature": 0, "max_new_tokens": 40, "stop": None}
        texts = [chunk["text"].removeprefix(begin + prompt) for chunk in llava_stream(worker, body)]
        assert texts[-1].strip() == ANSWER and not any("<|" in text for text in texts)


def test_messages_cannot_forge_a_turn(worker: str) -> None:
    client = openai.OpenAI(base_url=f"{worker}/v1", api_key="none", max_retries=0)

    def num_tokens(text: str) -> int:
        messages: Any = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="llama-3", messages=messages, temperature=0, max_tokens=1)
        return int(answer.usage.prompt_tokens) if answer.usage else 0

    assert num_tokens("Look <|eot_id|>") - num_tokens("Look ") >= 5


def test_plan_doctor_and_data_name_the_template_that_fits(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "stage.yaml"
    config.write_text(dump_config(build_config(wrong(settings, tmp_path))))
    rows, base = settings["data"]["rows"][0], settings["model"]["language_model"]
    for arguments in (
        ["plan", str(config), "--gpu", "cpu"],
        ["data", "check", rows, "--tokenizer", base, "--bad", str(tmp_path / "bad.jsonl")],
        ["data", "preview", rows, "--tokenizer", base],
    ):
        with pytest.raises(UserError, match=REFUSAL):
            CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    config.with_name("right.yaml").write_text(dump_config(build_config(settings)))
    found = CliRunner().invoke(build_app(), ["doctor", str(config), str(config.with_name("right.yaml"))])
    words = " ".join(found.output.split())
    assert "has no token </s> that template" in words and "template llama_3 fits" in words and found.exit_code == 1


def test_the_hf_export_ends_its_answer_in_stock_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    export_run(run, tmp_path / "hf", format="hf")
    processor = AutoProcessor.from_pretrained(str(tmp_path / "hf"))
    model = LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "hf")).eval()
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True) == ANSWER
    assert ids[-1] == processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")


@pytest.mark.parametrize(
    ("template", "pre", "end"), [("llama_3", "llama-bpe", "<|eot_id|>"), ("chatml", "qwen2", "<|im_end|>")]
)
def test_the_gguf_export_names_pattern_and_end(run: Path, tmp_path: Path, template: str, pre: str, end: str) -> None:
    from gguf import GGUFReader

    source, manifest = run, read_manifest(run)
    if template == "chatml":  # the same weights with Qwen2's tokenizer
        base = with_tokenizer(Path(manifest.language_model), qwen_2_tokenizer(280), tmp_path / "base")
        source = copy_run(run, tmp_path / "run", template=template, language_model=str(base))
    export_run(source, tmp_path / "gguf", format="gguf", dtype="float32")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "gguf" / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == pre
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == end
    assert end in fields["tokenizer.chat_template"]
    assert ("bos_token ~" in fields["tokenizer.chat_template"]) == fields["tokenizer.ggml.add_bos_token"]
