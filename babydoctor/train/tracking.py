"""Write a run's metrics to metrics.jsonl, TensorBoard and wandb."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

from babydoctor.config import RunConfig, TrackingConfig
from babydoctor.files import split_lines, write_json, write_text
from babydoctor.schema import UserError

WANDB_FILE = "wandb.json"
"""Stores the run's wandb id, so that a resumed run continues the same curves."""


def check_tracking(tracking: TrackingConfig) -> None:
    """Check that the packages of the configured trackers are installed, without importing them.

    Raises:
        UserError: a package is missing.
    """
    needed = {"tracking.tensorboard": tracking.tensorboard, "tracking.wandb_project": bool(tracking.wandb_project)}
    for key, is_set in needed.items():
        package = key.removeprefix("tracking.").removesuffix("_project")
        if is_set and importlib.util.find_spec(package) is None:
            extra, off = ("wandb", "null") if package == "wandb" else ("train", "false")
            raise UserError(
                f"{key}={getattr(tracking, key.removeprefix('tracking.'))} needs the package {package}, which is not "
                f"installed; run `pip install 'babydoctor[{extra}]'` or set {key}={off}"
            )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``."""
    return read_json_lines(run / "metrics.jsonl")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; empty if there is no file. Reading stops at a half-written line."""
    records = []
    for line in split_lines(path.read_text(encoding="utf-8")) if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Tracker:
    """Writes each record to metrics.jsonl and to the configured trackers. Only the main process has one."""

    def __init__(self, run: Path, config: RunConfig, *, start: int) -> None:
        """Keep the records up to step ``start``. Later steps will be trained again, so their records are dropped."""
        self.run = run
        kept = [record for record in read_metrics(run) if record["step"] <= start]
        self.recorded = {(record["kind"], record["step"]) for record in kept}
        write_text(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(run, config.tracking, start)
        self._wandb = _open_wandb(run, config)

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Write one record; numbers also go to TensorBoard and wandb under ``kind/name``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close all trackers."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(run: Path, tracking: TrackingConfig, start: int) -> Any:
    if not tracking.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)


def _open_wandb(run: Path, config: RunConfig) -> Any:
    """Open the wandb run, with its files in ``run``. The id is written first, so that a crash does not lose it."""
    if config.tracking.wandb_project is None:
        return None
    import wandb

    file = run / WANDB_FILE
    if not file.is_file():
        write_json(file, {"id": secrets.token_hex(4), "project": config.tracking.wandb_project})
    id = json.loads(file.read_text(encoding="utf-8"))["id"]
    try:
        return wandb.init(
            project=config.tracking.wandb_project,
            name=config.name,
            id=id,
            resume="allow",
            dir=str(run),
            config=config.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"tracking.wandb_project={config.tracking.wandb_project!r}: wandb could not start the run ({error}); run "
            "`wandb login`, set WANDB_MODE=offline, or set tracking.wandb_project=null"
        ) from error
