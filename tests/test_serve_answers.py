"""``AnswerStream``: what the reader gets of what the writer puts in."""

from __future__ import annotations

import asyncio
import json

import pytest
import requests
from helpers.serving import generation, llava_answer, tiny_worker

from babydoctor.engine.request import TokenLogprob
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.streaming import AnswerDelta, AnswerGroup, AnswerStream, EndOfAnswer, open_all


async def nothing() -> None:
    pass


def test_deltas_that_a_slow_reader_has_not_read_are_merged():
    async def run() -> None:
        answer = AnswerStream(nothing)
        answer.put(AnswerDelta("a", token_ids=(1,), logprobs=(TokenLogprob(1, "a", -1.0),)))
        answer.put(AnswerDelta("b", token_ids=(2,), logprobs=(TokenLogprob(2, "b", -2.0),)))
        answer.put(AnswerDelta(finish_reason="stop"))
        answer.finish()
        delta = await answer.next(1)
        assert delta is not None and (delta.text, delta.token_ids, delta.finish_reason) == ("ab", (1, 2), "stop")
        assert [logprob.text for logprob in delta.logprobs] == ["a", "b"]
        with pytest.raises(EndOfAnswer):
            await answer.next(1)

    asyncio.run(run())


def test_a_timeout_gives_none_and_an_error_gives_a_delta():
    async def run() -> None:
        answer = AnswerStream(nothing)
        assert await answer.next(0.01) is None
        asyncio.get_running_loop().call_later(0.01, answer.fail, ApiError("worker_lost", "Lost."))
        delta = await answer.next(5)
        assert delta is not None and delta.error is not None
        assert (delta.error.message, delta.error.error_code, delta.error.code) == ("Lost.", 3, "worker_lost")

    asyncio.run(run())


def test_cancellation_of_a_reader_is_not_lost_when_a_delta_arrives():
    """asyncio.wait_for would return the delta and lose the cancellation (Python 3.10 and 3.11)."""

    async def run() -> None:
        answer = AnswerStream(nothing)
        reading = asyncio.ensure_future(answer.next(5))
        await asyncio.sleep(0)
        answer.put(AnswerDelta("a"))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await answer.next(0) == AnswerDelta("a")  # and the delta is not lost

    asyncio.run(run())


def test_closing_stops_the_work_once_and_wakes_the_reader():
    async def run() -> None:
        stopped: list[str] = []

        async def stop() -> None:
            stopped.append("work")

        answer = AnswerStream(stop)
        answer.on_closed(lambda: stopped.append("counted"))
        reading = asyncio.ensure_future(answer.next(5))
        await asyncio.sleep(0)
        await answer.aclose()
        await answer.aclose()
        with pytest.raises(EndOfAnswer):
            await reading
        assert stopped == ["work", "counted"]
        answer.put(AnswerDelta("late"))
        with pytest.raises(EndOfAnswer):
            await answer.next(0)

    asyncio.run(run())


def test_text_that_came_before_an_error_is_kept():
    async def run() -> None:
        answer = AnswerStream(nothing)
        answer.put(AnswerDelta("half "))
        answer.put(AnswerDelta("an answer"))
        answer.fail(ApiError("worker_lost", "Lost."))
        delta = await answer.next(1)
        assert delta is not None and delta.text == "half an answer" and delta.error is not None

    asyncio.run(run())


def test_several_answers_are_read_as_one_stream_with_their_index():
    async def run() -> None:
        answers = [AnswerStream(nothing) for _ in range(3)]
        group = AnswerGroup(answers)
        assert await group.next(0.01) is None
        asyncio.get_running_loop().call_later(0.01, answers[2].put, AnswerDelta("c"))
        delta = None
        while delta is None:
            delta = await group.next(1)
        assert (delta.index, delta.text) == (2, "c")
        for answer, text in zip(answers, "xyz", strict=True):
            answer.put(AnswerDelta(text, finish_reason="stop"))
            answer.finish()
        texts = {}
        with pytest.raises(EndOfAnswer):
            while True:
                if (delta := await group.next(1)) is not None:
                    texts[delta.index] = delta.text
        assert texts == {0: "x", 1: "y", 2: "z"}
        await group.aclose()

    asyncio.run(run())


def test_a_refusal_of_one_answer_closes_the_others():
    async def run() -> None:
        closed: list[int] = []

        async def open_one(index: int) -> AnswerStream:
            async def close() -> None:
                closed.append(index)

            if index == 2:
                raise ApiError("queue_full", "Busy.")
            return AnswerStream(close)

        with pytest.raises(ApiError, match="Busy"):
            await open_all([open_one(index) for index in range(3)])
        assert closed == [0, 1]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["CT", " "], "CT"),
        (["CT ", "of", " the chest", " \n", "\t"], "CT of the chest"),
        ([" CT", "", " ", "", "b"], " CT b"),
        ([" ", "\n"], ""),
    ],
)
@pytest.mark.parametrize("ending", ["stop", "length", "error", None])
def test_an_answer_never_ends_with_whitespace(texts: list[str], shown: str, ending: str | None):
    """The text so far never ends with whitespace either, so a stream may break off anywhere."""

    async def run() -> None:
        answer, seen, token_ids = AnswerStream(nothing), "", ()
        for index, text in enumerate(texts):
            answer.put(AnswerDelta(text, token_ids=(index,)))
            delta = await answer.next(1)
            assert delta is not None
            seen, token_ids = seen + delta.text, token_ids + delta.token_ids
            assert seen == seen.rstrip()
        if ending == "error":
            answer.fail(ApiError("worker_lost", "Lost."))
        elif ending is not None:
            answer.put(AnswerDelta(finish_reason=ending))
        answer.finish()
        with pytest.raises(EndOfAnswer):
            while (delta := await answer.next(1)) is not None:
                seen += delta.text
        assert seen == shown and token_ids == tuple(range(len(texts)))  # another worker continues after all tokens

    asyncio.run(run())


def test_no_api_ends_an_answer_with_whitespace():
    """Streamed and collected, at the length limit and at a stop string. Tokens of dropped whitespace are reported."""
    url, num_blank = tiny_worker().url, 0
    for seed in range(12):
        # Token 3 is the space, and the bias makes answers with many of them.
        sampling = {"temperature": 1, "seed": seed, "logit_bias": {"3": 8}}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 6, "logprobs": 0} | sampling
        whole = requests.post(f"{url}/v1/completions", json=body, timeout=60).json()
        (choice,) = whole["choices"]
        tokens, text = choice["logprobs"]["tokens"], choice["text"]
        assert "".join(tokens).rstrip() == text and len(tokens) == whole["usage"]["completion_tokens"] == 6
        num_blank += tokens[-1].isspace()
        streamed = requests.post(f"{url}/v1/completions", json=body | {"stream": True}, timeout=60).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == text
        mark = next(
            (index for index in range(1, 6) if tokens[index - 1].isspace() and not tokens[index].isspace()), None
        )
        if mark is not None:
            stopped = requests.post(f"{url}/v1/completions", json=body | {"stop": tokens[mark]}, timeout=60).json()
            (choice,) = stopped["choices"]
            assert choice["finish_reason"] == "stop" and choice["text"] == choice["text"].rstrip()
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 6} | sampling
        answer = requests.post(f"{url}/v1/chat/completions", json=chat, timeout=60).json()
        answers = [
            answer["choices"][0]["message"]["content"],
            llava_answer(url, generation(max_new_tokens=6) | sampling),
        ]
        assert all(text == text.rstrip() for text in answers)
    assert num_blank >= 2
