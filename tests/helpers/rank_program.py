"""The program of every rank in ``test_ranks.py``: a whole run, then the same run resumed from its second step.

``accelerate launch ... -m helpers.rank_program CONFIG OUT [RANK:KEY=VALUE ...]``; an override is for one rank only.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from babydoctor.config import load_config
from babydoctor.schema import UserError
from babydoctor.train import sharding
from babydoctor.train.loop import train
from helpers.training import unfinish


def main(config: str, out: str, *overrides: str) -> None:
    rank = os.environ["RANK"]
    own = [override.partition(":")[2] for override in overrides if override.startswith(f"{rank}:")]
    settings = load_config(config, [f"output_dir={out}", *own])
    held: list[int] = []
    prepared = sharding.Trainee.__init__

    def record(self: sharding.Trainee, *args: object) -> None:
        """Record the bytes of the model's weights, and of this rank's share."""
        model: Any = args[1]
        held.append(sum(parameter.nbytes for parameter in model.parameters()))
        prepared(self, *args)  # type: ignore[arg-type]
        local = (getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in self.model.parameters())
        held.append(sum(x.numel() * x.element_size() for x in local))

    sharding.Trainee.__init__ = record  # type: ignore[method-assign]
    run = Path(settings.output_dir)
    train(settings)
    if rank == "0":
        shutil.copytree(run, run.with_name(run.name + "-whole"))
        unfinish(run, last_step=2)
    torch.distributed.barrier()
    train(settings, resume=True)
    report = {"world_size": torch.distributed.get_world_size(), "weight_bytes": held[0], "share_bytes": held[1]}
    run.with_name(f"{run.name}-rank-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
