"""Ask llama.cpp of March 2025 (llama-cpp-python 0.3.8), which has CLIP's class token in the right place.

Tests run it with that version on the ``PYTHONPATH``, because two versions cannot be loaded into one process:
``python llama_cpp_before_mtmd.py FOLDER questions.json answers.json``. Questions are
``[[PNG path, question, longest answer], ...]``; each answer is ``[text, its ids but the last, the
prompt's last logits]``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import llava_cpp

from babydoctor.interop.chat_template import LLAMA_CPP_MARKER


def open_model(folder: Path) -> tuple[Any, Any]:
    model = llama_cpp.Llama(
        str(folder / "model.gguf"),
        n_ctx=1024,
        n_threads=1,
        verbose=False,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    tower = llava_cpp.clip_model_load(str(folder / "mmproj.gguf").encode(), 0)
    assert tower, "mmproj.gguf was refused"
    return model, tower


def read_image(model: Any, tower: Any, png: bytes) -> None:
    """Let llama.cpp decode, preprocess, encode and project the image."""
    data = (ctypes.c_uint8 * len(png)).from_buffer(bytearray(png))
    embed = llava_cpp.llava_image_embed_make_with_bytes(tower, 1, data, len(png))
    past = ctypes.c_int(model.n_tokens)
    assert llava_cpp.llava_eval_image_embed(model.ctx, embed, model.n_batch, ctypes.pointer(past))
    model.input_ids[model.n_tokens : past.value] = -1
    model.n_tokens = past.value
    llava_cpp.llava_image_embed_free(embed)


def answer(model: Any, tower: Any, png: bytes, question: str, num_new: int) -> tuple[str, list[int], list[float]]:
    template = ImmutableSandboxedEnvironment().from_string(model.metadata["tokenizer.chat_template"])
    content = [{"type": "text", "text": LLAMA_CPP_MARKER}, {"type": "text", "text": question}]
    prompt = template.render(messages=[{"role": "user", "content": content}], bos_token="<s>")
    before, after = prompt.split(LLAMA_CPP_MARKER)
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(model.tokenize(before.encode(), add_bos=False, special=True))
    read_image(model, tower, png)
    model.eval(model.tokenize(after.encode(), add_bos=False, special=True))
    logits = model.scores[model.n_tokens - 1].tolist()
    ids = model.input_ids[: model.n_tokens].tolist()
    result = model.create_completion(ids, max_tokens=num_new, temperature=0.0, repeat_penalty=1.0)
    written = model.input_ids[len(ids) : model.n_tokens].tolist()  # the last one was not read again
    return result["choices"][0]["text"], written, logits


def main(folder: Path, questions: Path, answers: Path) -> None:
    model, tower = open_model(folder)
    asked = json.loads(questions.read_text())
    answers.write_text(json.dumps([answer(model, tower, Path(png).read_bytes(), *rest) for png, *rest in asked]))


main(*map(Path, sys.argv[1:]))
