"""The processes of one launch (``accelerate launch``, ``torchrun``) that share work without exchanging tensors."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from babydoctor.schema import UserError

T = TypeVar("T")

_WAIT = datetime.timedelta(days=30)
"""A rank may finish hours before another. If a rank dies, the launcher ends all, so no shorter limit is needed."""


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Work that ``size`` processes share; this one is number ``rank``."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of items that all ranks have in the same order."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Wait until every rank is here. Raises ``UserError`` if another one has ended."""
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(f"rank {self.rank}: another rank has ended, see its message") from error


def check_alone(what: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ``UserError`` if this process is one of several ranks."""
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{what} runs in one process; start it without accelerate launch or torchrun")


@contextmanager
def join_ranks(environment: Mapping[str, str] = os.environ) -> Iterator[SharedWork]:
    """Join the launch that this process belongs to; alone, there is one rank.

    Raises:
        UserError: the launcher's configuration asks for sharded weights.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SharedWork()
        return
    for flag, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environment.get(flag, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"accelerate's configuration asks for {engine}, but here each rank holds the whole model; use "
                "configs/accelerate/multi_gpu.yaml"
            )
    import torch.distributed as dist

    ranks = SharedWork(int(environment["RANK"]), size)
    dist.init_process_group("gloo", timeout=_WAIT)  # only ``wait`` uses it, so gloo does on GPUs too
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
