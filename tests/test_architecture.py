"""Check the rules of the package's structure on its sources.

An allow-list gives each exception with its reason. Remove an entry when its reason no longer holds.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from helpers.source_tree import (
    PACKAGE,
    annotated_with,
    decisions_by_text,
    find_cycle,
    imported_modules,
    imported_names,
    long_strings,
    module_state,
    modules,
    parse,
    process_switches,
    relative_imports,
)

# From the bottom to the top: a folder, or a top-level module, imports only from those before it.
FOLDERS = (
    *(
        "cores",
        "errors",
        "schema",
        "markers",
        "templates",
        "conversation",
        "progress",
        "config_file",
        "hub",
        "imaging",
        "config",
        "files",
    ),
    *("ranks", "memory_maps", "runtime"),
    *("data", "model", "engine", "inference", "interop", "phantom", "plan", "eval", "train", "serve"),
    *("demo", "bench", "cli", "__main__"),
)

# Imports that close a cycle or go up, until their files are split.
OPEN_IMPORTS: set[tuple[str, str]] = set()

# Programs that `python -m` starts import the command line, which imports their folder.
PROGRAMS = {"train.__main__"}

MAX_LINES, MAX_FILES = 300, 16

LONG_FILES: dict[str, str] = {}

LARGE_FOLDERS: dict[str, str] = {}

SWITCHES = {
    "bench/peers/batched.py": "calls llama.cpp's C API by ctypes, in a process of its own",
    "demo/steps.py": "sets the number of threads of processes that it starts, and restores it at the end of the block",
    "engine/cpu/library.py": "calls the compiled operator by ctypes; changes nothing of the process",
    "serve/page/pacs/report.py": "restores the warning filters at the end of the block",
}

WHOLE_SETTINGS = {
    "config.py": "defines RunConfig",
    "serve/settings.py": "defines ServeSettings",
    "train/loop.py": "runs a stage",
    "train/stage.py": "runs a stage",
    "train/output.py": "writes the whole configuration into the run and compares it on resume",
    "train/identity.py": "compares the whole configuration over ranks and runs",
    "train/report.py": "writes the whole configuration to the tracker",
    "train/tracking.py": "writes the whole configuration to the tracker",
    "train/in_training_eval.py": "builds the evaluation from the sections data, train and in_training_eval",
    "plan/plan.py": "plans the whole stage: every section decides on memory or time",
    "plan/model.py": "plans the whole stage",
    "plan/options.py": "plans the whole stage",
    "plan/ranks.py": "plans the whole stage",
    "bench/train.py": "builds and runs a whole stage",
    "serve/launch.py": "starts all processes from one file",
    "serve/controller/app.py": "builds the controller's process",
    "serve/controller/controller.py": "reads the sections controller and limits",
    "serve/worker/app.py": "builds the worker's process",
    "serve/worker/backend.py": "chooses what the worker runs by the sections worker and engine",
    "serve/worker/upstream.py": "reads the sections worker, upstream and limits",
    "serve/worker/worker.py": "reads the sections worker and limits",
}

REPEATED_CLASSES: dict[str, str] = {}

# Decisions by the text of an error whose class carries nothing else.
ERROR_TEXT: dict[str, str] = {}

HEAVY = {"torch", "transformers", "gradio", "datasets", "deepspeed", "matplotlib", "peft", "bitsandbytes", "fastapi"}

# Modules that do not load torch, not even indirectly, because their processes must start fast.
TORCH_FREE = (
    *("schema", "conversation", "data.packing", "config", "imaging.windows", "imaging.dicom", "imaging.load"),
    *("data.rows", "data.sources", "files", "train.interrupt", "eval.metrics", "engine.request", "serve.api.protocol"),
    *("serve.controller.registry", "serve.api.admission", "serve.controller.controller", "serve.page.app"),
    *("serve.client", "cli.main", "config_file"),
)


def in_package(name: str) -> str:
    return modules()[name].relative_to(PACKAGE).as_posix()


def check_places(found: Mapping[str, object], allowed: Collection[str] = ()) -> None:
    """Fail for places that break a rule, and for exceptions that no longer break it."""
    broken = {place: what for place, what in found.items() if what}
    assert {place: what for place, what in broken.items() if place not in allowed} == {}
    assert set(allowed) - broken.keys() == set(), "these exceptions are no longer needed"


# 1. No import cycle; folders in one order.


def test_no_import_cycle_between_files() -> None:
    edges = {name: imported_modules(path) - {name} for name, path in modules().items() if name}
    for name, other in OPEN_IMPORTS:
        edges.get(name, set()).discard(other)
    assert find_cycle(edges) == []


def test_imports_are_absolute() -> None:
    """The rules about imports do not see relative ones."""
    check_places({in_package(name): relative_imports(parse(path)) for name, path in modules().items()})


def test_every_module_belongs_to_a_folder_in_the_order() -> None:
    assert {name.split(".")[0] for name in modules() if name} <= set(FOLDERS)


def test_folders_import_those_before_them_only() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name and name not in PROGRAMS
        for other in imported_modules(path)
        if (name, other) not in OPEN_IMPORTS and FOLDERS.index(other.split(".")[0]) > FOLDERS.index(name.split(".")[0])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("model", ("babydoctor.train", "babydoctor.engine")),
        ("engine", ("fastapi", "uvicorn", "starlette", "babydoctor.serve", "babydoctor.data", "babydoctor.train")),
        ("serve.controller", ("torch", "transformers")),
        ("serve.page", ("torch", "transformers")),
        ("eval.metrics", ("torch", "babydoctor.model")),
    ],
)
def test_forbidden_imports(module: str, forbidden: tuple[str, ...]) -> None:
    found = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name == module or name.startswith(module + ".")
        for other in imported_names(parse(path))
        if any(other == bad or other.startswith(bad + ".") for bad in forbidden)
    ]
    assert found == []


@pytest.mark.parametrize("start", TORCH_FREE)
def test_importing_these_does_not_load_torch(start: str) -> None:
    known, seen, waiting = modules(), set(), [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        loaded = {other.split(".")[0] for other in imported_names(parse(known[name]), only_at_import=True)}
        assert not loaded & {"torch", "transformers", "peft", "accelerate"}, f"{start} loads {loaded & HEAVY} by {name}"
        waiting += imported_modules(known[name], only_at_import=True)


def test_commands_import_nothing_heavy_at_import() -> None:
    for name, path in modules().items():
        if name == "cli" or name.startswith("cli."):
            loaded = {other.split(".")[0] for other in imported_names(parse(path), only_at_import=True)}
            assert not loaded & HEAVY, (name, loaded & HEAVY)


# 2. Small files and folders.


def test_files_are_short() -> None:
    lengths = {in_package(name): len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    check_places({name: length for name, length in lengths.items() if length > MAX_LINES}, LONG_FILES)


def test_folders_are_small() -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    for path in modules().values():
        counts[path.parent.relative_to(PACKAGE).as_posix()] += path.name != "__init__.py"
    check_places({name: count for name, count in counts.items() if count > MAX_FILES}, LARGE_FOLDERS)


# 3. Process-wide switches in runtime.py; no state in modules.


def test_only_runtime_changes_the_process() -> None:
    found = {in_package(name): process_switches(parse(path)) for name, path in modules().items()}
    check_places(found, {"runtime.py", *SWITCHES})


def test_only_the_command_line_calls_runtime() -> None:
    callers = {name for name, path in modules().items() if "runtime" in imported_modules(path)}
    assert {name for name in callers if name.split(".")[0] != "cli"} == set()


def test_modules_keep_no_state() -> None:
    check_places({in_package(name): module_state(parse(path)) for name, path in modules().items()})


# 4. Errors are distinguished by their code.


def test_no_decision_reads_the_text_of_an_error() -> None:
    check_places({in_package(name): decisions_by_text(parse(path)) for name, path in modules().items()}, ERROR_TEXT)


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept E as error:\n    if 'limit' in str(error): g()",
        "try: f()\nexcept E as error:\n    text = str(error)\n    if 'limit' in text: g()",
        "def f(error: UserError):\n    return error.args[0].startswith('x')",
        "try: f()\nexcept E as e:\n    x = re.search('a', str(e).lower())",
        "def f(error: ApiError):\n    return error.message == 'x'",
        "try: f()\nexcept E as error:\n    if 'limit' in f'{error}': g()",
    ],
)
def test_the_rule_finds_such_decisions(source: str) -> None:
    assert decisions_by_text(ast.parse(source))


# 5. No HTML, CSS or JavaScript in the code.

_MARKUP = re.compile(r"</\w+>|<\w+[^<>]*/?>\s*\n|\{\s*[\w-]+\s*:[^{}]*;|=>|\bfunction\s*\w*\(|\b(const|let|var) \w+ =")


def test_no_markup_in_strings() -> None:
    found = [
        f"{in_package(name)}:{line}"
        for name, path in modules().items()
        for line, text in long_strings(parse(path), max_lines=3)
        if _MARKUP.search(text)
    ]
    assert found == []


# 6. A component takes its own section of the settings.


def test_components_take_their_section_of_the_settings() -> None:
    found = {
        in_package(n): annotated_with(parse(path), {"RunConfig", "ServeSettings"}) for n, path in modules().items()
    }
    check_places({name: lines for name, lines in found.items() if not name.startswith("cli/")}, WHOLE_SETTINGS)


# 7. One name per concept.


def test_no_two_classes_of_one_name() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    check_places({name: found for name, found in places.items() if len(found) > 1}, REPEATED_CLASSES)


_OLD_NAMES = re.compile(
    r"\b(grey|mend(s|ed|ing)?\b|KV memory|common beginning|model folder|signs? of life)"
    r"|colour|behaviour|favour|neighbour|artefact"
    r"|((norm|gener|speci|initi|seri|visu)al|quant|optim|token|organ|recogn|minim|maxim|util|summar)is(e|ing|ation)"
)
_TEXTS = ("README.md", "MODEL_CARD.md", *(f"{folder}/**/*" for folder in ("babydoctor", "tests", "scripts", "configs")))
# Rows of the glossary.
_MAY_NAME_THEM = (
    "| model folder |",
    "| common beginning |",
    "| KV memory |",
    "| mend |",
    "| sign of life |",
    "| grey,",
)


def test_old_names_and_british_spellings_are_not_used() -> None:
    found = []
    for path in {path for pattern in _TEXTS for path in PACKAGE.parent.glob(pattern)} - {Path(__file__)}:
        if path.suffix in {".py", ".md", ".yaml", ".sh", ".js", ".css", ".html", ".sbatch"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if any(name in line for name in _MAY_NAME_THEM):
                    continue
                if match := _OLD_NAMES.search(line.replace("grey16_marker", "")):
                    found.append(f"{path.relative_to(PACKAGE.parent)}:{number}: {match[0]}")
    assert found == []


# 8. Tests share helpers; the package mocks nothing.


def test_tests_import_helpers_only() -> None:
    folder = PACKAGE.parent / "tests"
    siblings = {path.stem for path in folder.glob("*.py")} | {"tests"}
    found = [
        f"{path.name}:{node.lineno} imports {module}"
        for path in [*folder.glob("*.py"), *folder.glob("helpers/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if module.split(".")[0] in siblings
    ]
    assert found == []


def test_no_mocks_in_the_package() -> None:
    found = {
        name for name, path in modules().items() if any(n.startswith("unittest") for n in imported_names(parse(path)))
    }
    assert found == set()
