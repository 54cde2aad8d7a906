"""The import directions of the design, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "babydoctor"

# From the bottom up; a module imports from its own layer and those below. A name covers a module or a package.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "runtime"),
    ("schema",),
    ("markers",),
    ("files", "hub", "config_file", "conversation", "data.packing", "imaging.windows"),
    ("config",),
    ("imaging", "data", "model", "bench.measure", "bench.models"),
    ("engine",),
    ("inference",),
    ("data.sets", "phantom", "demo.tiny_language", "demo.tiny_tower", "interop"),
    ("plan",),
    ("train", "eval", "serve", "bench"),
    ("demo",),
    ("cli",),
    ("cli.main", "train.__main__"),
)

# Free of torch even indirectly through our own modules: they run in processes that must start at once.
TORCH_FREE = (
    *("schema", "conversation", "data.packing", "config", "imaging.windows", "imaging.dicom", "imaging.load"),
    *("data.rows", "data.sources", "files", "train.interrupt", "eval.metrics", "engine.request", "serve.api.protocol"),
    *("serve.controller.registry", "serve.api.admission", "serve.controller.controller", "serve.page.app"),
    *("serve.client", "cli.main", "config_file"),
)

HEAVY = {"torch", "transformers", "gradio", "datasets", "deepspeed", "matplotlib", "peft", "bitsandbytes", "fastapi"}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Full names of what a module imports; with ``only_at_import`` what importing it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.stmt | ast.AST] = list(ast.walk(tree))
    if only_at_import:
        nodes, waiting = [], list(tree.body)
        while waiting:
            node = waiting.pop()
            nodes.append(node)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node):
                continue
            waiting += [
                child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))
            ]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(path: Path, **options: bool) -> set[str]:
    known = modules()
    names = {name.removeprefix("babydoctor.") for name in imports(path, **options) if name.startswith("babydoctor.")}
    return {name for name in names if name in known}


def layer(module: str) -> int:
    """The longest name in LAYERS that covers a module."""
    best, found = "", -1
    for index, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(name + ".")) and len(name) > len(best):
                best, found = name, index
    return found


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if name and layer(name) < 0] == []


def test_imports_go_down_only() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name
        for other in ours(path)
        if layer(other) > layer(name)
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
def test_never(module: str, forbidden: tuple[str, ...]) -> None:
    found = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name == module or name.startswith(module + ".")
        for other in imports(path)
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
        loaded = {other.split(".")[0] for other in imports(known[name], only_at_import=True)}
        assert not loaded & {"torch", "transformers", "peft", "accelerate"}, f"{start} loads {loaded & HEAVY} by {name}"
        waiting += ours(known[name], only_at_import=True)


def test_commands_import_nothing_heavy_at_import() -> None:
    for name, path in modules().items():
        if name == "cli" or name.startswith("cli."):
            loaded = {other.split(".")[0] for other in imports(path, only_at_import=True)}
            assert not loaded & HEAVY, (name, loaded & HEAVY)
