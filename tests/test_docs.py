"""README and guides: commands parse and run, links and markers are valid, and plan tables equal the planner's.

A fenced ``bash`` block has a comment on the line before it that says where its commands run::

    <!-- run in tests -->            here, on tiny fixtures
    <!-- run by: FILE -->            by another test or by .ci/run
    <!-- not run here: REASON -->    nowhere
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.serving import png, start_worker, stop_all, tiny_run, wait_ready
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.config import load_config
from babydoctor.serve.settings import load_settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "babydoctor"
README = ROOT / "README.md"
GUIDES = [README, ROOT / "MODEL_CARD.md", *sorted(PACKAGE.rglob("README.md"))]
RUNNERS = {"babydoctor/eval/README.md": "tests/test_eval_guide.py"}
"""Guides whose blocks need no comment, because one test runs them all."""

SETTINGS_COMMANDS = ("serve", "controller", "worker", "web")
SHORTER = {"eval": ("--resamples", "100")}
"""Options that make a command faster."""

EACH_GUIDE = pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block. ``comment`` is the text of the HTML comment on the line before it, or empty."""

    guide: str
    line: int
    language: str
    comment: str
    text: str

    def __str__(self) -> str:
        return f"{self.guide}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments and leading ``NAME=value``."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines if not line.startswith("export ")]
        return [found for line in words if (found := _without_variables(line))]


def _without_variables(words: list[str]) -> list[str]:
    first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[first:]


def read_blocks(guide: Path) -> Iterator[Block]:
    name, before = str(guide.relative_to(ROOT)), ""
    lines = enumerate(guide.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if opening := re.fullmatch(r"(`{3,})(\w*)", line):
            text = []
            for _, inner in lines:
                if inner == opening[1]:
                    break
                text.append(inner)
            comment = re.fullmatch(r"<!-- (.*) -->", before)
            yield Block(name, number, opening[2], comment[1] if comment else "", "\n".join(text) + "\n")
        before = line


BLOCKS = [block for guide in GUIDES for block in read_blocks(guide)]
BASH = [block for block in BLOCKS if block.language == "bash"]


def inline_commands(guide: Path) -> Iterator[list[str]]:
    """``babydoctor`` commands in running text and tables; words in capitals stand for values."""
    text = re.sub(r"^```.*?^```", "", guide.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+\n?[^`\n]*)`", text):
        if code.startswith("babydoctor "):
            yield code.replace("[", "").replace("]", "").split()


def find_command(words: list[str]) -> tuple[TyperCommand | TyperGroup, str, list[str]]:
    """The command that ``babydoctor WORDS`` runs, its name, and the arguments that are left."""
    command = get_command(build_app())
    names: list[str] = []
    while isinstance(command, TyperGroup):
        subcommands = command.commands
        if not words or words[0] == "--help":
            return command, " ".join(names), []
        if words[0] not in subcommands and "run" in subcommands:
            command = subcommands["run"]  # `eval RUN`
            break
        assert words[0] in subcommands, f"no command {' '.join([*names, words[0]])!r}"
        names.append(words[0])
        command, words = subcommands[words[0]], words[1:]
    return command, " ".join(names), words


def check_settings(name: str, arguments: list[str]) -> None:
    """Every ``key=value`` of a command is a setting that exists and has a value of its type."""
    overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    if name in ("train", "plan"):
        load_config(ROOT / arguments[0], overrides)
    elif name in SETTINGS_COMMANDS:
        load_settings(None, overrides)


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200, (
        "move text into the guides of the folders, or write the GPU report into the benchmark guide only"
    )


@EACH_GUIDE
def test_markers_come_in_pairs(guide: Path) -> None:
    markers = re.findall(r"<!-- ([^:>]+): (begin|end) -->", guide.read_text(encoding="utf-8"))
    names = [name for name, _ in markers[::2]]
    assert markers == [(name, kind) for name in names for kind in ("begin", "end")], markers
    assert len(set(names)) == len(names), f"{names}: a section appears twice"


def anchors(guide: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_GUIDE
def test_links_and_paths_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = guide.parent / path if path else guide
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"
    for path in re.findall(r"`((?:tests|configs|scripts|images|\.ci)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists(), f"{path} does not exist"
    for path in re.findall(r"`((\w+)/[\w/]+\.py)`", text):
        if (PACKAGE / path[1]).is_dir():
            assert (PACKAGE / path[0]).is_file(), f"babydoctor/{path[0]} does not exist"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_every_block_states_where_it_runs(block: Block) -> None:
    if block.guide in RUNNERS:
        assert (ROOT / RUNNERS[block.guide]).is_file()
        return
    kind, _, value = block.comment.partition(": ")
    assert kind in ("run in tests", "run by", "not run here"), (
        f"{block}: put one of these comments before it: `run in tests`, `run by: FILE`, `not run here: REASON`"
    )
    assert bool(value) == (kind != "run in tests"), block.comment
    if kind == "run by":
        runner = (ROOT / value).read_text(encoding="utf-8")
        for words in block.commands():
            word = find_command(words[1:])[1].split()[-1] if words[0] == "babydoctor" else words[1]
            name = re.escape(Path(word).stem)
            assert re.search(rf"\b{name}\b", runner), f"{block}: {value} does not run {' '.join(words)}"


def test_no_command_is_in_a_block_that_is_not_run() -> None:
    for block in BLOCKS:
        if block.language != "bash":
            hidden = re.search(r"^(babydoctor [a-z]|bash |pip |python -m ).*", block.text, re.MULTILINE)
            assert hidden is None, f"{block}: make it a bash block"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_parse(block: Block) -> None:
    for words in block.commands() if not block.text.startswith("curl ") else []:
        if words[0] == "babydoctor":
            command, name, arguments = find_command(words[1:])
            command.make_context(name, list(arguments))
            check_settings(name, arguments)
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
            if words[1] in ("scripts/align.sh", "scripts/instruct.sh", "scripts/radiology.sh"):
                check_settings("train", [f"configs/{Path(words[1]).stem}.yaml", *words[2:]])


@EACH_GUIDE
def test_inline_commands_exist(guide: Path) -> None:
    for words in inline_commands(guide):
        known = [word for word in words[1:] if not word.isupper() and word not in ("...", "|")]
        command, _, arguments = find_command(known)
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in options]
        assert not unknown, f"{' '.join(words)}: {unknown}"


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_rows: Path, request: pytest.FixtureRequest
) -> Path:
    """A folder with the files that the guides' commands use: a run, rows, images, a scan, a tokenizer and settings."""
    from pydicom.data import get_testdata_file

    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(request.getfixturevalue("tiny_run"), folder / "runs" / "radiology")
    shutil.copy(tiny_rows / "rows.json", folder)
    shutil.copytree(tiny_rows / "images", folder / "images")
    (folder / "scan.png").write_bytes(png())
    shutil.copy(get_testdata_file("CT_small.dcm", download=False), folder / "scan.dcm")
    (folder / "tokenizer").symlink_to(tiny_base / "llama")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


RUN_HERE = [block for block in BLOCKS if block.comment == "run in tests"]
CALLS_A_SERVER = [block for block in RUN_HERE if "127.0.0.1:21001" in block.text]


@pytest.mark.parametrize("block", [block for block in RUN_HERE if block not in CALLS_A_SERVER], ids=str)
def test_commands_run(block: Block, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    commands = block.commands()
    assert commands
    for program, *words in commands:
        assert program == "babydoctor", f"{block}: only babydoctor commands run here"
        result = CliRunner().invoke(build_app(), [*words, *SHORTER.get(words[0], ())])
        assert result.exit_code == 0, (words, result.output[-2000:], result.exception)
        assert result.output.strip(), words


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a worker that serves a tiny model under the name that the guides use."""
    server = start_worker(tiny_run(), tmp_path_factory.mktemp("api") / "log", "worker.model_name=radiology")
    try:
        yield wait_ready(server).url.removeprefix("http://")
    finally:
        stop_all([server])


@pytest.mark.parametrize("block", CALLS_A_SERVER, ids=str)
def test_requests_are_answered(block: Block, checkout: Path, api: str) -> None:
    if block.language == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = block.text.replace("127.0.0.1:21001", api)
    command = ["bash", "-euc", text] if block.language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20 and '"error"' not in done.stdout, done.stdout


def test_planned_costs_equal_the_planners() -> None:
    guide = (PACKAGE / "train" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `babydoctor (plan \S+ --gpu a10)` \| ([\d.]+) GiB \|.*\| ([\d.]+) \|$", guide, re.MULTILINE)
    assert len(rows) == 3
    for command, memory_gib, hours in rows:
        words = command.split()
        result = CliRunner().invoke(build_app(), [words[0], str(ROOT / words[1]), *words[2:]])
        total = re.search(r"^ *total +([\d.]+) GiB of", result.output, re.MULTILINE)
        assert total is not None, result.output
        assert f"{float(total[1]):.1f}" == memory_gib, f"train/README.md: {command} now says {total[1]} GiB"
        assert re.search(rf"\b{re.escape(hours)} (h|hours)\b", result.output), (command, hours, result.output)
        assert f"{hours} planned hours" in README.read_text(encoding="utf-8")
