"""Errors are told apart by their code, never by their message."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from PIL import Image

import babydoctor
from babydoctor.errors import USER_ERROR_CODES, UserError
from babydoctor.imaging.load import load_image
from babydoctor.serve.api.errors import (
    API_CODES,
    ERROR_KINDS,
    ApiError,
    code_of_status,
    code_of_user_error,
    known_code,
)
from babydoctor.serve.page.scan import dicom_error, picture_error

PACKAGE = Path(babydoctor.__file__).parent

_TEXT_TESTS = {"startswith", "endswith", "find", "index", "count", "match", "search", "fullmatch"}


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
        """True where the expression holds the text of an exception."""
        return any(self._is_text_itself(part) for part in ast.walk(node))

    def _is_text_itself(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr in ("args", "msg", "message") and self._is_error(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in ("str", "repr") and any(map(self._is_error, node.args))
        return isinstance(node, ast.Name) and node.id in self.texts

    def _is_error(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.errors


def _decisions_by_text(source: str) -> list[int]:
    reader = _MessageReader()
    reader.visit(ast.parse(source))
    return reader.lines


def test_no_decision_in_the_package_reads_the_text_of_an_error():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in _decisions_by_text(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept E as error:\n    if 'limit' in str(error): g()",
        "try: f()\nexcept E as error:\n    text = str(error)\n    if 'limit' in text: g()",
        "def f(error: UserError):\n    return error.args[0].startswith('x')",
        "try: f()\nexcept E as e:\n    x = re.search('a', str(e).lower())",
        "def f(error: ApiError):\n    return error.message == 'x'",
    ],
)
def test_the_rule_finds_such_decisions(source: str):
    assert _decisions_by_text(source)


def test_every_code_has_a_kind_and_a_wrong_code_is_refused():
    assert set(ERROR_KINDS) == set(API_CODES)
    with pytest.raises(AssertionError):
        UserError("x", code="no_such_code")  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        ApiError("no_such_code", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("message", ["", "the limit is too large, a strip, holds no image, decoder is missing"])
@pytest.mark.parametrize(
    ("code", "status", "page_code"),
    [
        ("image_too_large", 413, "too_many_pixels"),
        ("image_bad_shape", 422, "odd_shape"),
        ("image_unreadable", 422, "damaged_image"),
    ],
)
def test_status_and_sentence_follow_from_the_code_alone(message: str, code: str, status: int, page_code: str):
    error = UserError(message, code=code)  # type: ignore[arg-type]
    assert ApiError(code_of_user_error(error), str(error)).status == status
    assert picture_error(error, looks_like_image=True).code == page_code


@pytest.mark.parametrize(
    ("code", "page_code"),
    [
        ("dicom_without_image", "dicom_without_image"),
        ("dicom_without_decoder", "dicom_without_decoder"),
        ("dicom_unreadable", "bad_dicom"),
    ],
)
def test_dicom_sentences_follow_from_the_code(code: str, page_code: str):
    assert dicom_error(UserError("the limit is too large", code=code)).code == page_code  # type: ignore[arg-type]


def _image(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image_empty"),
        (b"no image", "image_unreadable"),
        (_image(90, 90)[:60], "image_unreadable"),
        (_image(101, 100), "image_too_large"),
        (_image(100, 1), "image_bad_shape"),
        (bytes(128) + b"DICM", "dicom_without_image"),
    ],
)
def test_images_are_refused_with_their_code(data: bytes, code: str):
    with pytest.raises(UserError) as caught:
        load_image(data, max_pixels=10_000)
    assert caught.value.code == code


def test_a_missing_file_has_its_code(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / "none.png")
    assert caught.value.code == "image_missing"


def test_other_servers_codes_become_ours():
    assert known_code("queue_full") == "queue_full" and known_code("their_own") == "worker_failed"
    statuses = {429: "queue_full", 401: "worker_refused", 502: "worker_lost", 500: "worker_failed"}
    assert {status: code_of_status(status) for status in statuses} == statuses


def test_exit_statuses():
    assert {UserError("x", code=code).exit_status for code in USER_ERROR_CODES} == {2, 3, 4}
    assert UserError("x").exit_status == 2


def test_the_serving_guide_lists_every_code_as_it_is():
    guide = (PACKAGE / "serve" / "README.md").read_text(encoding="utf-8")
    table = guide.partition("<!-- error codes -->\n")[2].partition("<!-- end of error codes -->")[0]
    rows = [f"| `{code}` | {kind.status} | {kind.error_code} | {kind.meaning} |" for code, kind in ERROR_KINDS.items()]
    assert table.splitlines()[2:] == rows
