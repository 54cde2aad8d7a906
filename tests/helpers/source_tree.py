"""The package as syntax trees, for the tests of its architecture."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "babydoctor"

_TEXT_TESTS = {"startswith", "endswith", "find", "index", "count", "match", "search", "fullmatch"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file. The package itself is ``""``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module, *, only_at_import: bool = False) -> set[str]:
    """Full names of what a module imports.

    Args:
        only_at_import: ignore imports in functions and under ``TYPE_CHECKING``.
    """
    nodes: Iterable[ast.AST] = _run_at_import(tree) if only_at_import else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def imported_modules(path: Path, *, only_at_import: bool = False) -> set[str]:
    """The package's own modules that a file imports.

    ``from babydoctor.a import b`` counts as ``a.b`` if that is a module, and as ``a`` if it is not.
    """
    found: set[str] = set()
    for name in imported_names(parse(path), only_at_import=only_at_import):
        if name.startswith("babydoctor."):
            found |= {name.removeprefix("babydoctor.")} & modules().keys()
    return found


def _run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        is_type_checking = (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
        if not is_type_checking and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.excepthandler))]


def relative_imports(tree: ast.Module) -> list[int]:
    """Lines with a relative import, such as ``from .a import b``."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of a cycle, with the first one repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if found := visit(other, [*trail, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in sorted(edges))), [])


_MESSAGE_SWITCHES = ("set_verbosity", "disable_progress_bar", "filterwarnings", "simplefilter")


def process_switches(tree: ast.Module) -> list[int]:
    """Lines that change the whole process: ctypes, environment, ``torch.set_*``, ``torch.backends``, warnings."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            lines += [node.lineno for alias in node.names if alias.name.split(".")[0] == "ctypes"]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            is_environment = node.module == "os" and not names.isdisjoint({"environ", "environb", "putenv", "unsetenv"})
            lines += [node.lineno] * ((node.module or "").split(".")[0] == "ctypes" or is_environment)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            texts = [ast.unparse(target) for target in targets]
            lines += [node.lineno for text in texts if text.startswith(("os.environ", "torch.backends."))]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_switch = name.startswith("torch.set_") or name == "torch.use_deterministic_algorithms"
            methods = ("setdefault", "update", "pop", "popitem", "clear")
            is_environment = name in {f"os.environ.{method}" for method in methods} | {"os.putenv", "os.unsetenv"}
            is_message = name.split(".")[-1].startswith(_MESSAGE_SWITCHES)
            lines += [node.lineno] * (is_switch or is_environment or is_message)
    return lines


_CONTAINERS = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "LRUCache", "TTLCache"}
_CHANGES = {
    *("append", "extend", "insert", "remove", "add", "discard", "update", "setdefault", "pop", "popitem", "clear"),
}


def module_state(tree: ast.Module) -> list[int]:
    """Lines where a module keeps state: an empty container, ``global``, or a global that a function changes."""
    lines, containers = [], {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = node.value
        containers |= {target.id for target in targets if isinstance(target, ast.Name)}
        is_empty = isinstance(value, (ast.Dict, ast.List)) and not ast.unparse(value).strip("{}[]")
        is_built = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in _CONTAINERS
        lines += [node.lineno] * (is_empty or is_built)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            own |= {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
            lines += [n.lineno for n in ast.walk(function) if _changes(n, containers - own)]
    return lines


def _changes(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Global):
        return True
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return isinstance(node.value, ast.Name) and node.value.id in names
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
        return isinstance(node.func.value, ast.Name) and node.func.value.id in names
    return False


def long_strings(tree: ast.Module, max_lines: int) -> Iterator[tuple[int, str]]:
    """Line and text of strings of more than ``max_lines`` lines that are not docstrings."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in bare:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.strip("\n").splitlines()) > max_lines:
            yield node.lineno, text


def annotated_with(tree: ast.Module, names: set[str]) -> list[int]:
    """Lines of arguments and fields whose annotation names one of ``names``."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, (ast.arg, ast.AnnAssign))
        and node.annotation is not None
        # As text, because a quoted annotation is a string in the tree.
        and not names.isdisjoint(re.findall(r"\w+", ast.unparse(node.annotation)))
    ]


def decisions_by_text(tree: ast.Module) -> list[int]:
    """Lines that decide by the text of an exception: ``"..." in str(error)``, ``error.msg.startswith(...)``."""
    reader = _MessageReader()
    reader.visit(tree)
    return reader.lines


class _MessageReader(ast.NodeVisitor):
    """Finds decisions on an exception's text: ``"..." in str(error)``, ``error.msg.startswith(...)`` and the like."""

    def __init__(self) -> None:
        self.errors: set[str] = set()
        self.texts: set[str] = set()
        self.lines: list[int] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = set(self.errors), set(self.texts)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is not None and ast.unparse(argument.annotation).endswith(("Error", "Exception")):
                self.errors.add(argument.arg)
        self.generic_visit(node)
        self.errors, self.texts = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.errors.add(node.name)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._is_text(node.value):
            self.texts |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        if any(self._is_text(side) for side in sides):
            self.lines.append(node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in _TEXT_TESTS:
            self.lines += [node.lineno] * any(self._is_text(part) for part in (function.value, *node.args))
        self.generic_visit(node)

    def _is_text(self, node: ast.expr) -> bool:
        """True if the expression holds the text of an exception."""
        return any(self._is_text_itself(part) for part in ast.walk(node))

    def _is_text_itself(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in ("args", "msg", "message") and self._is_error(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in ("str", "repr") and any(map(self._is_error, node.args))
        if isinstance(node, ast.FormattedValue):
            return self._is_error(node.value)
        return isinstance(node, ast.Name) and node.id in self.texts

    def _is_error(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.errors
