"""The tiny preset's trained runs give the same answers in transformers and in llama.cpp.

Training takes minutes, so these tests use the output of ``scripts/demo.sh``. ``.ci/run`` runs them after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_answers import regret
from PIL import Image

from babydoctor.config import TaskConfig
from babydoctor.demo.demo import MAX_NEW_TOKENS
from babydoctor.eval.ask import GenerationConfig, ask, build_inference
from babydoctor.eval.conditions import ConditionedImages
from babydoctor.eval.load import load_task
from babydoctor.eval.tasks import Question
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.export import export_run
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import IMAGE_TOKEN

ROOT = Path(__file__).parents[1]
DEMO = Path(os.environ.get("BABYDOCTOR_DEMO", ROOT / ".demo"))
NUM_CASES = 30
ROUNDING = {"float32": 0.002, "float16": 0.01}
"""Logits from llama.cpp differ from ours by less."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DEMO / "radiology" / "manifest.json").is_file(), reason="scripts/demo.sh has not run"),
]


@pytest.fixture(scope="module")
def cases() -> list[Question]:
    """Questions of every kind about as many held-out phantoms as possible."""
    questions = load_task(TaskConfig(task="phantom", data=str(DEMO / "phantoms"))).questions
    return list(questions[:: len(questions) // NUM_CASES][:NUM_CASES])


def our_answers(run: Run, cases: list[Question]) -> list[str]:
    config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
    images = ConditionedImages(cases, "right", run.manifest.image)
    with build_inference(run.model, run.tokenizer, run.manifest, cases, config) as inference:
        return [prediction.answer for prediction in ask(inference, cases, images, config)]


def load(case: Question) -> Image.Image:
    assert isinstance(case.image, Path)
    return load_image(case.image)


@pytest.mark.parametrize("stage", ["instruct", "radiology"])
def test_transformers_gives_the_same_answers(stage: str, cases: list[Question], tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    export_run(DEMO / stage, tmp_path / "hf", format="hf", dtype="float32")
    processor: Any = AutoProcessor.from_pretrained(str(tmp_path / "hf"))
    model: Any = LlavaForConditionalGeneration.from_pretrained(str(tmp_path / "hf"), dtype=torch.float32).eval()
    answers = []
    for case in cases:
        content = [{"type": "image"}, {"type": "text", "text": case.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=load(case), text=text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert answers == our_answers(load_run(DEMO / stage), cases)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("stage", ["instruct", "radiology"])
def test_llama_cpp_gives_the_same_answers(
    stage: str, dtype: str, cases: list[Question], tmp_path: Path, ask_old_llama_cpp: Callable[..., Any]
) -> None:
    export_run(DEMO / stage, tmp_path / "gguf", format="gguf", dtype=dtype)
    answers = ask_old_llama_cpp(tmp_path / "gguf", [(case.image, case.prompt, MAX_NEW_TOKENS) for case in cases])
    run = load_run(DEMO / stage)
    ours = our_answers(run, cases)
    assert len(set(ours)) > 5
    num_other = 0
    for case, answer, (text, written, _) in zip(cases, ours, answers, strict=True):
        if text.strip() == answer:
            continue
        # Where two answers are about equally likely, rounding may choose between them.
        pixels = torch.from_numpy(to_pixels(load(case), run.manifest.image))
        below = max(regret(run, pixels, written, f"{IMAGE_TOKEN}\n{case.prompt}"))
        assert stage == "instruct" and below < ROUNDING[dtype], (case, answer, text, below)
        num_other += 1
    print(f"{stage} {dtype}: {NUM_CASES - num_other} of {NUM_CASES} answers equal")
    assert num_other <= 3
