"""An answer between its maker and its reader."""

from __future__ import annotations

import asyncio

import pytest

from babydoctor.engine.request import TokenLogprob
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.streaming import Answer, AnswerDelta, AnswerGroup, EndOfAnswer, open_all


async def nothing() -> None:
    pass


def test_what_a_slow_reader_has_not_fetched_is_one_delta():
    async def run() -> None:
        answer = Answer(nothing)
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


def test_silence_is_none_and_errors_are_deltas():
    async def run() -> None:
        answer = Answer(nothing)
        assert await answer.next(0.01) is None
        asyncio.get_running_loop().call_later(0.01, answer.fail, ApiError("worker_lost", "Lost."))
        delta = await answer.next(5)
        assert delta is not None and delta.error is not None
        assert (delta.error.message, delta.error.error_code, delta.error.code) == ("Lost.", 3, "worker_lost")

    asyncio.run(run())


def test_a_reader_cancelled_just_as_a_delta_comes_is_cancelled():
    """asyncio.wait_for would return the delta and forget the cancellation (Python 3.10 and 3.11)."""

    async def run() -> None:
        answer = Answer(nothing)
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

        answer = Answer(stop)
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
        answer = Answer(nothing)
        answer.put(AnswerDelta("half "))
        answer.put(AnswerDelta("an answer"))
        answer.fail(ApiError("worker_lost", "Lost."))
        delta = await answer.next(1)
        assert delta is not None and delta.text == "half an answer" and delta.error is not None

    asyncio.run(run())


def test_several_answers_are_read_as_one_stream_with_their_index():
    async def run() -> None:
        answers = [Answer(nothing) for _ in range(3)]
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


def test_if_one_of_several_answers_is_refused_the_others_are_closed():
    async def run() -> None:
        closed: list[int] = []

        async def open_one(index: int) -> Answer:
            async def close() -> None:
                closed.append(index)

            if index == 2:
                raise ApiError("queue_full", "Busy.")
            return Answer(close)

        with pytest.raises(ApiError, match="Busy"):
            await open_all([open_one(index) for index in range(3)])
        assert closed == [0, 1]

    asyncio.run(run())
