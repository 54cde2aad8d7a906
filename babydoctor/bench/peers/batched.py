"""llama.cpp's batched C API for several users at once, as a program: ``python -m babydoctor.bench.peers.batched``.

It runs in its own process without torch, so that two OpenMP libraries do not share one process. It prints one JSON line
when the model is loaded, then one line with timings for each line of questions that it reads.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp

IMAGE_MARK = "<image>"
"""Where a prompt has its image."""

BATCH = 512
"""llama.cpp's default for the rows that it computes at once."""


@dataclass
class RunningAnswer:
    """One answer in progress to the question ``number``. Its next token goes to ``position`` of its sequence."""

    number: int
    begun_s: float
    prompt_tokens: int
    position: int
    tokens: list[int]
    first_token_s: float


class BatchedModel:
    """A language model with an image encoder, and a context with one sequence for each user.

    Args:
        folder: what ``babydoctor export --format gguf`` writes.
        context: tokens of one sequence.
    """

    def __init__(self, folder: Path, *, num_users: int, context: int, num_threads: int) -> None:
        self._num_users = num_users
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), parameters)
        assert self._model is not None, f"{folder}: model.gguf was refused"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = context * num_users, num_users
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = num_threads
        options.kv_unified = False  # faster for sequences without a common prefix, as llama.h says
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        assert self._context is not None, "llama.cpp could not create the context"
        encoder = mtmd_cpp.mtmd_context_params_default()
        encoder.use_gpu, encoder.print_timings, encoder.n_threads = False, False, num_threads
        tower = str(folder / "mmproj-cls-last.gguf").encode()
        self._encoder = mtmd_cpp.mtmd_init_from_file(tower, self._model, encoder)
        assert self._encoder is not None, f"{folder}: mmproj-cls-last.gguf was refused"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(num_users, 0, 1)

    def answer(self, questions: list[dict[str, str]], max_new_tokens: int) -> list[dict[str, Any]]:
        """Answer all questions, with as many at the same time as there are users. Each user asks one after the other.

        Args:
            questions: ``prompt`` with ``IMAGE_MARK``, and ``image`` as base64.

        Returns:
            In the order in which answers end: the fields of ``RunningAnswer``, and ``last_token_s``. Both times count
            from when the question was asked.
        """
        waiting, done = deque(enumerate(questions)), []
        idle = {sequence: time.perf_counter() for sequence in range(self._num_users)}
        running: dict[int, RunningAnswer] = {}
        while waiting or running:
            while waiting and idle:
                sequence = min(idle, key=lambda sequence: idle[sequence])
                number, question = waiting.popleft()
                begun_s = idle.pop(sequence)
                length = self._read_prompt(question, sequence)
                first = self._likeliest(-1)
                waited_s = time.perf_counter() - begun_s
                running[sequence] = RunningAnswer(number, begun_s, length, length, [first], waited_s)
            self._step({key: answer for key, answer in running.items() if len(answer.tokens) < max_new_tokens})
            now = time.perf_counter()
            for sequence, answer in list(running.items()):
                if len(answer.tokens) == max_new_tokens:
                    done.append(asdict(answer) | {"last_token_s": now - answer.begun_s})
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    del running[sequence]
                    idle[sequence] = now
        return done

    def _read_prompt(self, question: dict[str, str], sequence: int) -> int:
        """Compute a prompt with its image. Returns its number of positions."""
        with self._prompt_chunks(question) as chunks:
            end = llama_cpp.llama_pos(0)
            failed = mtmd_cpp.mtmd_helper_eval_chunks(
                self._encoder, self._context, chunks, 0, sequence, BATCH, True, ctypes.byref(end)
            )
            assert not failed, f"llama.cpp could not compute the prompt: {failed}"
        return int(end.value)

    @contextmanager
    def _prompt_chunks(self, question: dict[str, str]) -> Iterator[Any]:
        """llama.cpp's tokens and image of a prompt."""
        marker = mtmd_cpp.mtmd_default_marker().decode()
        text = question["prompt"].replace(IMAGE_MARK, marker).encode()
        png = base64.b64decode(question["image"])
        data = (ctypes.c_uint8 * len(png)).from_buffer_copy(png)
        bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_buf(self._encoder, data, len(png), False)
        assert bitmap is not None, "llama.cpp refused the image"
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            prompt = mtmd_cpp.mtmd_input_text()
            prompt.text, prompt.text_len, prompt.add_special, prompt.parse_special = text, len(text), True, True
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            failed = mtmd_cpp.mtmd_tokenize(self._encoder, chunks, ctypes.byref(prompt), bitmaps, 1)
            assert not failed, f"llama.cpp could not tokenize the prompt: {failed}"
            yield chunks
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def _step(self, answers: dict[int, RunningAnswer]) -> None:
        """One decoding step: the next token of each answer, by sequence."""
        if not answers:
            return
        self._batch.n_tokens = len(answers)
        for row, (sequence, answer) in enumerate(answers.items()):
            self._batch.token[row], self._batch.pos[row] = answer.tokens[-1], answer.position
            self._batch.n_seq_id[row], self._batch.seq_id[row][0], self._batch.logits[row] = 1, sequence, 1
            answer.position += 1
        failed = llama_cpp.llama_decode(self._context, self._batch)
        assert not failed, f"llama_decode failed: {failed}"
        for row, answer in enumerate(answers.values()):
            answer.tokens.append(self._likeliest(row))

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._num_tokens,)).argmax())


def main(write: Callable[[str], object]) -> None:
    """Load the model, then answer lines of questions until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for option in ("--users", "--context", "--threads"):
        parser.add_argument(option, type=int, required=True)
    given = parser.parse_args()
    model = BatchedModel(given.folder, num_users=given.users, context=given.context, num_threads=given.threads)
    write(json.dumps("ready"))
    for line in sys.stdin:
        asked = json.loads(line)
        write(json.dumps(model.answer(asked["questions"], asked["max_new_tokens"])))


if __name__ == "__main__":
    main(lambda line: print(line, flush=True))
