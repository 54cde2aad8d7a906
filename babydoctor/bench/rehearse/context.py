"""State shared by the steps of a rehearsal: paths, running commands, and results."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from babydoctor.bench.rehearse.commands import FinishedProcess, StepError, python_module, run_process, shown
from babydoctor.bench.rehearse.sizes import GIB, Size
from babydoctor.schema import UserError

STAGES = ("align", "instruct", "radiology")
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@dataclass
class Row:
    """One line of the table: a command, or a comparison of results (``seconds`` is None)."""

    step: str
    label: str
    seconds: float | None = None
    peak_bytes: int | None = None
    plan_bytes: int | None = None
    note: str = ""
    ok: bool = True


@dataclass
class Context:
    """A rehearsal in progress.

    Attributes:
        work: folder for all files.
        rows: the results so far.
    """

    size: Size
    work: Path
    console: Console
    rows: list[Row] = field(default_factory=list)
    step: str = ""

    @property
    def language_model(self) -> Path:
        return self.work / "base" / "llama"

    @property
    def vision_tower(self) -> Path:
        return self.work / "base" / "clip"

    @property
    def run(self) -> Path:
        """The run that is asked, merged and exported: a copy of the last stage with LoRAs that change its answers."""
        return self.work / "runs" / "strong"

    @property
    def template(self) -> str:
        """The run's conversation template."""
        return str(json.loads((self.run / "manifest.json").read_text(encoding="utf-8"))["template"])

    @property
    def held_out(self) -> Path:
        """ROCO's validation split as published."""
        return self.work / "sources" / "roco" / "data" / "validation" / "radiology"

    @property
    def image(self) -> Path:
        """The image that questions are about: the first of the held-out split."""
        return min((self.held_out / "images").iterdir())

    def stage_run(self, stage: str) -> Path:
        return self.work / "runs" / stage

    def execute(
        self,
        label: str,
        arguments: Sequence[str],
        *,
        kill_when: Callable[[], bool] | None = None,
        plan_of: Callable[[FinishedProcess], int | None] = lambda finished: None,
    ) -> FinishedProcess:
        """Run a command and add its row.

        Args:
            kill_when: SIGKILL is sent when this is true; the command must not end before.
            plan_of: reads the planned peak in bytes from the command's output.

        Raises:
            StepError: the command failed.
        """
        row = Row(self.step, label)
        self.rows.append(row)
        self.console.print(f"  $ {shown(arguments, self.work)}", markup=False, soft_wrap=True)
        log = self.work / "logs" / f"{len(self.rows):02d}-{label.replace(' ', '-').replace('/', '-')}"
        try:
            finished = run_process(
                arguments,
                log,
                console=self.console,
                limit_s=self.size.limit_s,
                num_threads=self.size.num_threads,
                kill_when=kill_when,
            )
            row.seconds, row.peak_bytes, row.plan_bytes = finished.seconds, finished.peak_bytes, plan_of(finished)
            planned = f", planned {row.plan_bytes / GIB:.2f}" if row.plan_bytes else ""
            self.console.print(f"    {row.seconds:.1f} s, peak {row.peak_bytes / GIB:.2f} GiB{planned}", style="dim")
            if kill_when is not None and finished.status == 0:
                raise StepError("it ended before it could be killed")
            if finished.status != (0 if kill_when is None else -signal.SIGKILL):
                raise StepError(f"{finished.error()}\n{finished.tail()}")
        except StepError as error:
            row.ok, row.note = False, str(error).splitlines()[0]
            raise
        return finished

    def execute_module(self, label: str, module: str, *arguments: str | Path) -> FinishedProcess:
        """Run a module of this folder as a program."""
        return self.execute(label, python_module(f"babydoctor.bench.rehearse.{module}", *arguments))

    def compare(self, label: str, note: str, faults: Sequence[str] = ()) -> None:
        """Add the row of a comparison. It fails if there are faults; the step continues."""
        self.rows.append(Row(self.step, label, note="; ".join([note, *faults]), ok=not faults))
        self.console.print(
            f"    {'ok' if not faults else 'FAILED'}: {label}: {self.rows[-1].note}", markup=False, soft_wrap=True
        )

    @contextlib.contextmanager
    def product(self, *products: Path) -> Iterator[None]:
        """Delete old output of a command, and delete the new output at the end of the block if the size asks for it."""
        remove(*products)
        try:
            yield
        finally:
            if self.size.deletes_products:
                remove(*products)

    def save(self) -> None:
        """Save the rows, so that a rehearsal in parts (``--only``) has one table."""
        values = {"size": self.size.name, "rows": [asdict(row) for row in self.rows]}
        (self.work / "rows.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def load(self) -> None:
        """Load the rows of an earlier part.

        Raises:
            UserError: the folder holds a rehearsal of another size, or none.
        """
        path = self.work / "rows.json"
        if not path.is_file():
            raise UserError(f"--keep {self.work} holds no rehearsal; run one without --only first")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["size"] != self.size.name:
            raise UserError(f"--keep {self.work} holds a rehearsal of --size {values['size']}, not {self.size.name}")
        self.rows = [Row(**row) for row in values["rows"]]


def remove(*paths: Path) -> None:
    """Delete what an earlier attempt of a step left."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
