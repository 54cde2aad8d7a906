"""The ranks of a run, and their communication apart from gradients.

It uses a separate gloo group with a timeout of days, because the other ranks wait while rank 0 evaluates or writes a
checkpoint, often for longer than the timeout of the engine's collectives.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

from babydoctor.schema import UserError

T = TypeVar("T")

WAIT_TIMEOUT = timedelta(days=7)


class Ranks:
    """This process and the other ranks of a run.

    Attributes:
        rank: 0 to ``num_ranks - 1``. Rank 0 is the main process, the only one that writes to the output directory.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.num_ranks = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self._is_local_main = accelerator.is_local_main_process
        self._group = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT) if self.num_ranks > 1 else None

    def wait(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            distributed.barrier(group=self._group)

    def from_main(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the main process and return its result in every rank.

        Raises:
            UserError: in the main process, from ``function``. The other ranks exit with status 2 and no message.
        """
        if self._group is None:
            return function()
        outcome: list[Any] = [None]
        error: UserError | None = None
        if self.is_main:
            try:
                outcome = [(function(), True)]
            except UserError as caught:
                error, outcome = caught, [(None, False)]
        distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if error is not None:
            raise error
        result, succeeded = outcome[0]
        if not succeeded:
            raise SystemExit(2)
        return result

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the main process, then in one process of each other machine, then in the rest.

        For downloads and copies: later ranks find the files that earlier ones wrote, on a shared or a local disk.
        """
        turn = 0 if self.is_main else 1 if self._is_local_main else 2
        for now in range(3):
            if now == turn:
                result = function()
            self.wait()
        return result

    def share(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Send the main process's tensors to every rank, on the CPU. What the other ranks pass is ignored."""
        if self._group is None:
            return dict(tensors)
        kinds = self.from_main(lambda: {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            value = tensors[name].contiguous().cpu() if self.is_main else torch.empty(shape, dtype=dtype)
            distributed.broadcast(value.view(-1).view(torch.uint8), src=0, group=self._group)
            received[name] = value
        return received

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that every rank has the same facts.

        Raises:
            UserError: in the main process. The other ranks exit with status 2.
        """
        if self._group is None:
            return
        everyone: list[Any] = [None] * self.num_ranks
        distributed.all_gather_object(everyone, (socket.gethostname(), dict(facts)), group=self._group)
        host, expected = everyone[0]
        for rank, (other_host, found) in enumerate(everyone):
            for key, value in expected.items():
                if found.get(key) == value:
                    continue
                if not self.is_main:
                    raise SystemExit(2)
                raise UserError(
                    f"rank {rank} on {other_host} has another {key} than rank 0 on {host} ({found.get(key)!r}, not "
                    f"{value!r}); start all ranks with the same configuration, data and models"
                )

    def any_signal(self, received: int | None) -> int | None:
        """The largest signal number that any rank received; None if none did."""
        if self._group is None:
            return received
        number = torch.tensor(received or 0)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX, group=self._group)
        return int(number) or None
