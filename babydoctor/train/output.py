"""The output directory of a stage: lock it, decide whether its run can continue, and clean up after a failed start.

Besides the files of ``model/run_dir.py`` a run holds ``history.json``: digests of what the run started from, and one
entry per resume with the step and the changed settings.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from babydoctor.config import RunConfig, changed_settings, dump_config, load_config
from babydoctor.files import LOCK_FILE, DirectoryLock, remove_leftovers, write_json, write_text
from babydoctor.model.run_dir import Manifest
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import TrainState, find_newest_intact, read_state
from babydoctor.train.identity import identify_start, is_below
from babydoctor.train.ranks import Ranks

logger = logging.getLogger(__name__)

HISTORY = "history.json"

_CHANGEABLE = (
    *("name", "output_dir", "tracking", "eval"),
    *("data.rows", "data.images", "data.on_bad", "data.num_workers"),
    *("data.eval_rows", "data.eval_images", "data.eval_limit"),
    *("init_from", "model.language_model", "model.vision_tower"),
    *("train.micro_batch_tokens", "train.gradient_checkpointing", "train.fuse", "train.compile", "train.share_prefix"),
    *("train.max_steps", "train.epochs"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.num_sample_answers"),
)
"""Keys and sections that may change on resume. They decide how the same step is computed, where files are, what is
reported, and how long the run is. Moved rows and models are compared by content. A run may only become longer.

Another split into micro-batches changes rounding and the random numbers of LoRA dropout.
"""

_WRITTEN_AT_START = frozenset(
    {LOCK_FILE, HISTORY, "bad.jsonl", "base_adapters", "metrics.jsonl", "cut_and_left_out.jsonl"}
    | {"tensorboard", "wandb", "wandb.json"}
)
"""Files written before ``config.yaml``. A start that is killed leaves some of them, always with the lock file."""


class OutputDirectory:
    """Context manager that locks ``config.output_dir`` while a stage trains.

    A start that fails before its first step is done deletes what it wrote, unless the directory held a run before.

    Attributes:
        path: the directory.
        checkpoint: the checkpoint to continue from; None to train from the start.
        changes: settings that differ from the run's own, as ``key -> (old, new)``.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, *, resume: bool) -> None:
        """Only the main process reads and writes the directory. It sends what it finds to the other ranks."""
        self.config, self.resume, self.ranks = config, resume, ranks
        self.path = Path(config.output_dir)
        self.checkpoint: Path | None = None
        self.changes: dict[str, tuple[Any, Any]] = {}
        self._before: RunConfig | None = None
        self._lock = DirectoryLock(self.path)
        self._created: list[Path] = []
        self._undo = False

    def __enter__(self) -> OutputDirectory:
        self.ranks.from_main(self._acquire)
        return self

    def _acquire(self) -> None:
        self._created = _make_directory(self.path)
        was_started = (self.path / LOCK_FILE).exists()
        try:
            self._lock.acquire()
            self._open(was_started)
        except BaseException:
            self._close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._undo:
            for path in self.path.iterdir():
                if path.name != LOCK_FILE:
                    _delete(path)
        self._close()

    def find_checkpoint(self) -> None:
        """Set ``checkpoint`` and ``changes``.

        Raises:
            UserError: the run was trained with settings that change what is learned, or its checkpoints are damaged.
        """
        self.checkpoint = self.ranks.from_main(self._find_checkpoint)

    def _find_checkpoint(self) -> Path | None:
        written = self.path / "config.yaml"
        if not written.is_file():
            return None
        self._before = load_config(written)
        checkpoint = find_newest_intact(self.path)
        self.changes = changed_settings(self._before, self.config)
        if checkpoint is None:
            logger.warning("%s has no checkpoint yet; training starts from the first step", self.path)
            shutil.rmtree(self.path / "base_adapters", ignore_errors=True)
            return None
        refused = {key: values for key, values in self.changes.items() if not _may_change(key)}
        if refused:
            lines = [f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in refused.items()]
            raise UserError(
                f"{self.path} cannot continue with settings that change what is learned:\n"
                + "\n".join(lines)
                + f"\nUse the run's values (they are in {written}), or train with these in another output_dir."
            )
        return checkpoint

    def check_continues(self, start: TrainState, manifest: Manifest, num_steps_per_epoch: int) -> TrainState:
        """The state to continue from: ``start``, or the checkpoint's if data, base models and length fit.

        Raises:
            UserError: rows or base models differ from the run's, or the run would become shorter.
        """
        if self.checkpoint is None:
            return start
        return self.ranks.from_main(lambda: self._check_continues(start, manifest, num_steps_per_epoch))

    def _check_continues(self, start: TrainState, manifest: Manifest, num_steps_per_epoch: int) -> TrainState:
        assert self.checkpoint is not None and self._before is not None
        saved = read_state(self.checkpoint)
        if saved.data_fingerprint != start.data_fingerprint:
            raise UserError(
                f"data.rows={list(self.config.data.rows)} holds other rows than {self.path} was trained on "
                f"(fingerprint {start.data_fingerprint[:12]}, in the run {saved.data_fingerprint[:12]}); restore the "
                "rows, or train on these in another output_dir"
            )
        before, now = (num_steps(config, num_steps_per_epoch) for config in (self._before, self.config))
        if now < before:
            raise UserError(
                f"the run in {self.path} has {before} steps and would have {now} now "
                f"(train.max_steps={self.config.train.max_steps}, train.epochs={self.config.train.epochs}). A run can "
                "become longer, not shorter, because the learning rate follows the length; use the run's values or "
                "another output_dir"
            )
        identity, recorded = identify_start(self.config, manifest), self._history()["start"]
        for key, value in identity.items():
            if recorded.get(key) != value:
                setting = "init_from" if key == "init_from" or self.config.init_from else f"model.{key}"
                raise UserError(
                    f"{setting} leads to another {key} than {self.path} was trained on "
                    f"({value}, in the run {recorded.get(key)}); point {setting} at the original, or train in another "
                    "output_dir"
                )
        return saved

    def begin(self, manifest: Manifest, state: TrainState, strategy: str) -> None:
        """Record the configuration, the ranks and, on resume, what changed. Called when everything is loaded."""
        if not self.ranks.is_main:
            return
        now = {"ranks": self.ranks.num_ranks, "strategy": strategy}
        if self.checkpoint is None:
            history: dict[str, Any] = {"start": identify_start(self.config, manifest), **now, "resumes": []}
        else:
            history = self._history()
            before = {key: history.get(key, value) for key, value in now.items()}  # older runs do not record these
            if before != now:
                logger.warning(
                    "%s continues on %d ranks (%s); until step %d it was trained on %d (%s). Losses then differ by "
                    "rounding, and LoRA dropout draws other random numbers",
                    *(self.path, now["ranks"], strategy, state.step, before["ranks"], before["strategy"]),
                )
            changes = {**self.changes, **{key: (before[key], now[key]) for key in now if before[key] != now[key]}}
            history.update(now)
            changed = {key: {"from": old, "to": new} for key, (old, new) in changes.items()}
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            history["resumes"].append({"step": state.step, "time": created, "changed": changed})
        write_json(self.path / HISTORY, history)
        write_text(self.path / "config.yaml", dump_config(self.config))

    def keep(self) -> None:
        """Keep the run if a later step fails. Called when a step is done."""
        self._undo = False

    def _open(self, was_started: bool) -> None:
        """Check what is in the directory, and clean up after killed processes."""
        remove_leftovers(self.path)
        if (self.path / "config.yaml").is_file():
            if not self.resume:
                raise UserError(
                    f"output_dir={self.config.output_dir!r} already holds a run; continue it with --resume, choose "
                    "another output_dir, or delete it"
                )
            return
        found = {path.name for path in self.path.iterdir()} - {LOCK_FILE}
        if found and not (was_started and found <= _WRITTEN_AT_START):
            raise UserError(
                f"output_dir={self.config.output_dir!r} is not empty and holds no run (it has no config.yaml, but "
                f"{', '.join(sorted(found)[:3])}); choose another directory"
            )
        for name in found:
            _delete(self.path / name)
        self._undo = True

    def _close(self) -> None:
        self._lock.release()
        for path in reversed(self._created):  # only directories that are empty
            if any(path.iterdir()):
                break
            path.rmdir()

    def _history(self) -> dict[str, Any]:
        return json.loads((self.path / HISTORY).read_text(encoding="utf-8"))


def is_finished(config: RunConfig) -> bool:
    """True if the run in ``output_dir`` reached its last step and ``config`` does not change its length."""
    run = Path(config.output_dir)
    if not (run / "manifest.json").is_file() or not (run / "config.yaml").is_file():
        return False
    changes = changed_settings(load_config(run / "config.yaml"), config)
    return not {"train.max_steps", "train.epochs"} & changes.keys()


def num_steps(config: RunConfig, num_steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return config.train.max_steps or num_steps_per_epoch * config.train.epochs


def _may_change(key: str) -> bool:
    return is_below(key, _CHANGEABLE)


def _make_directory(path: Path) -> list[Path]:
    """Create a directory. Return the directories that were created, outermost first."""
    missing = []
    for directory in (path, *path.parents):
        if directory.exists():
            break
        missing.append(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir={str(path)!r} cannot be created ({error.strerror}); choose another directory"
        ) from error
    return missing[::-1]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
