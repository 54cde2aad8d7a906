"""Worker processes for the check. A worker that dies is an error that names the item it was working on."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from babydoctor.schema import UserError

Handler = Callable[[Any, Callable[[int], None]], Any]
"""Does one task and returns its result. It reports the index of each item before it starts on that item."""

StartHandler = Callable[[AbstractContextManager[Any]], Handler]
"""Called once in each worker, with a lock that the workers share. It must be picklable."""


@dataclass(frozen=True, slots=True)
class CheckTask:
    """``payload`` goes to the handler. ``labels`` name the items of the task in errors."""

    payload: Any
    labels: Sequence[str]


class Workers(Protocol):
    """Runs tasks, in any order."""

    @property
    def num_running(self) -> int:
        """Number of tasks that were submitted and not yet returned."""
        ...

    @property
    def has_room(self) -> bool:
        """True if a task that is submitted now starts at once."""
        ...

    def submit(self, task: CheckTask) -> None:
        """Start a task. Call it only if ``has_room``."""
        ...

    def wait(self) -> tuple[CheckTask, Any]:
        """Wait for the next finished task and its result. Call it only while a task is running."""
        ...


class InProcess:
    """Runs tasks in this process, one after the other."""

    def __init__(self, start: StartHandler) -> None:
        self._handler = start(contextlib.nullcontext())
        self._tasks: deque[CheckTask] = deque()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    @property
    def has_room(self) -> bool:
        return not self._tasks

    def submit(self, task: CheckTask) -> None:
        self._tasks.append(task)

    def wait(self) -> tuple[CheckTask, Any]:
        task = self._tasks.popleft()
        return task, self._handler(task.payload, lambda index: None)


class WorkerProcesses:
    """Runs tasks in ``num_processes`` processes, which end with the context."""

    def __init__(self, num_processes: int, start: StartHandler) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self._lock = context.Lock()  # keep a reference: a process that is still starting opens the lock by its name
        self._workers = [_Worker(context, start, self._lock) for _ in range(num_processes)]
        self._idle = deque(self._workers)
        self._busy: dict[Connection, _Worker] = {}

    def __enter__(self) -> WorkerProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()

    @property
    def num_running(self) -> int:
        return len(self._busy)

    @property
    def has_room(self) -> bool:
        return bool(self._idle)

    def submit(self, task: CheckTask) -> None:
        # Only an idle worker gets a task. It is receiving, so neither side can block the other with a full pipe.
        worker = self._idle.popleft()
        worker.send(task)
        self._busy[worker.connection] = worker

    def wait(self) -> tuple[CheckTask, Any]:
        """See ``Workers``.

        Raises:
            UserError: a worker died, or its handler raised it.
        """
        connection = wait(list(self._busy))[0]
        assert isinstance(connection, Connection)
        worker = self._busy.pop(connection)
        task, result = worker.receive()
        self._idle.append(worker)
        return task, result


class _Worker:
    """One process, its pipe, and the item that it is working on."""

    def __init__(self, context: Any, start: StartHandler, lock: Any) -> None:
        self.connection, theirs = context.Pipe()
        self._index = context.RawValue("q", -1)
        self._task: CheckTask | None = None
        self._process = context.Process(target=_work, args=(theirs, self._index, start, lock), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, task: CheckTask) -> None:
        self._index.value, self._task = -1, task
        with contextlib.suppress(BrokenPipeError):  # the worker has died; ``receive`` reports it
            self.connection.send(task.payload)

    def receive(self) -> tuple[CheckTask, Any]:
        task, self._task = self._task, None
        assert task is not None
        try:
            is_error, result = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._death(task) from None
        if is_error:
            raise result
        return task, result

    def _death(self, task: CheckTask) -> UserError:
        self._process.join(5)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        index = self._index.value
        where = f"{task.labels[index]}: the process that checked it"
        if index < 0:
            where = f"{task.labels[0]}: the process that was to check it"
        return UserError(
            f"{where} died ({how}); if memory was short, run again with fewer --processes, otherwise take the row out"
        )

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, index: Any, start: StartHandler, lock: AbstractContextManager[Any]) -> None:
    """The main function of a worker process: run tasks until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the parent ends its workers

    def report(number: int) -> None:
        index.value = number

    handler: Handler | None = None
    while True:
        try:
            payload = connection.recv()
        except (EOFError, OSError):
            return
        try:
            handler = handler or start(lock)
            answer = (False, handler(payload, report))
        except UserError as error:
            answer = (True, UserError(str(error), code=error.code))  # a subclass may not be picklable
        except Exception:
            answer = (True, RuntimeError(f"in a checking process:\n{traceback.format_exc()}"))
        connection.send(answer)
