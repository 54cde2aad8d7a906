"""An answer between its maker and its reader."""

from __future__ import annotations

import asyncio

import pytest

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import Chunk, TokenLogprob
from babydoctor.serve.api.streaming import Answer, EndOfAnswer


async def nothing() -> None:
    pass


def test_what_a_slow_reader_has_not_fetched_is_one_chunk():
    async def run() -> None:
        answer = Answer(nothing)
        answer.put(Chunk("a", token_ids=(1,), logprobs=(TokenLogprob("a", -1.0),)))
        answer.put(Chunk("ab", token_ids=(2,), logprobs=(TokenLogprob("b", -2.0),)))
        answer.put(Chunk("ab", finish_reason="stop"))
        answer.finish()
        chunk = await answer.next(1)
        assert chunk is not None and (chunk.text, chunk.token_ids, chunk.finish_reason) == ("ab", (1, 2), "stop")
        assert [logprob.text for logprob in chunk.logprobs] == ["a", "b"]
        with pytest.raises(EndOfAnswer):
            await answer.next(1)

    asyncio.run(run())


def test_silence_is_none_and_errors_are_chunks():
    async def run() -> None:
        answer = Answer(nothing)
        assert await answer.next(0.01) is None
        asyncio.get_running_loop().call_later(0.01, answer.fail, ApiError("worker_lost", "Lost."))
        chunk = await answer.next(5)
        assert chunk is not None and (chunk.text, chunk.error_code, chunk.code) == ("Lost.", 3, "worker_lost")

    asyncio.run(run())


def test_a_reader_cancelled_just_as_a_chunk_comes_is_cancelled():
    """asyncio.wait_for would return the chunk and forget the cancellation (Python 3.10 and 3.11)."""

    async def run() -> None:
        answer = Answer(nothing)
        reading = asyncio.ensure_future(answer.next(5))
        await asyncio.sleep(0)
        answer.put(Chunk("a"))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await answer.next(0) == Chunk("a")  # and the chunk is not lost

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
        answer.put(Chunk("late"))
        with pytest.raises(EndOfAnswer):
            await answer.next(0)

    asyncio.run(run())
