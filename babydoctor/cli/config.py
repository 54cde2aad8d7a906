"""``babydoctor config``: list every setting with default, type and meaning, as YAML that can be saved and edited."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from babydoctor.config_file import iterate_keys
from babydoctor.schema import UserError

COMMENT_COLUMN = 44
"""Column at which comments begin, unless the value is longer."""

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null", Any: "anything"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(config)


def config(
    config: Annotated[
        Optional[Path],  # noqa: UP045  (typer evaluates this on Python 3.10)
        typer.Argument(help="YAML file, for example configs/align.yaml; default: list the defaults"),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's"),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="list the settings of `babydoctor serve` instead of a stage's")
    ] = False,
) -> None:
    """List every setting with its default, type and meaning, and its value if a CONFIG is given."""
    from babydoctor.config import RunConfig
    from babydoctor.config_file import load

    settings = list(overrides or [])
    if config is not None and "=" in str(config) and not config.exists():
        settings, config = [str(config), *settings], None
    engine = None
    schema: type[BaseModel] = RunConfig
    if serve:
        from babydoctor.engine.settings import EngineSettings
        from babydoctor.serve.settings import ServeSettings

        schema, engine = ServeSettings, EngineSettings
    if settings and config is None and not serve:
        raise UserError(
            f"{settings[0]!r} changes a configuration, but none is given; "
            f"write `babydoctor config configs/align.yaml {settings[0]}`"
        )
    loaded = load(schema, config, settings) if config is not None or settings else None
    print("\n".join(format_keys(schema, loaded, free_form={"engine": engine} if engine else {})))


def format_keys(
    schema: type[BaseModel], loaded: BaseModel | None, free_form: dict[str, type[Any]] | None = None
) -> Iterator[str]:
    """One YAML line per key of the schema, with its type, default and meaning as a comment.

    Args:
        loaded: the configuration whose values are shown; None: the defaults.
        free_form: dataclasses that describe the free-form mappings of the schema, by key.
    """
    yield f"# {_first_paragraph(schema)}"
    values = loaded.model_dump(mode="json") if loaded is not None else None
    off: set[str] = set()  # optional sections that are not set; their keys are written as comments
    for key in iterate_keys(schema):
        depth = key.name.count(".")
        *parents, last = key.name.split(".")
        indent, given = "  " * depth, _given(values, key.name)
        is_off = ".".join(parents) in off
        if is_off:
            indent = f"# {indent}"
        dataclass = (free_form or {}).get(key.name)
        if key.section is not None or dataclass is not None:
            optional = " Optional section; null: none." if key.section and key.field.default is None else ""
            yield ""
            yield f"{indent}# {_first_paragraph(key.section or dataclass)}{optional}"
            is_null = given is None if values is not None else key.field.default is None
            if key.section is not None and is_null:
                off.add(key.name)
            yield f"{indent}{last}:{' null' if key.name in off else ''}"
            if dataclass is not None:
                yield from _format_dataclass(dataclass, indent + "  ", given or {})
            continue
        required = key.field.is_required()
        default = None if required else _plain(key.field.get_default(call_default_factory=True))
        value = default if values is None or is_off else given
        notes = [_type_words(key.field), "required" if required else f"default {_scalar(default)}"]
        if key.field.description:
            notes.append(key.field.description)
        yield _line(f"{indent}{last}: {'' if required and values is None else _scalar(value)}", notes)


def _format_dataclass(kind: type[Any], indent: str, given: dict[str, Any]) -> Iterator[str]:
    """Lines for the keys of a dataclass. Their meanings are in the ``Attributes`` of its docstring."""
    text = re.sub(r"\s*\n {12,}", " ", kind.__doc__ or "")
    meanings = dict(re.findall(r"^ +(\w+): (.+)$", text, flags=re.MULTILINE))
    for field in dataclasses.fields(kind):
        if field.metadata.get("hidden"):
            continue
        default = _plain(field.default)
        words = str(field.type).replace(" | ", " or ").replace("None", "null").replace("bool", "true or false")
        notes = [words.replace("int", "integer"), f"default {_scalar(default)}", meanings.get(field.name, "")]
        yield _line(f"{indent}{field.name}: {_scalar(given.get(field.name, default))}", [n for n in notes if n])


def _line(setting: str, notes: list[str]) -> str:
    return f"{setting:<{COMMENT_COLUMN}} # {'; '.join(notes)}"


def _given(values: dict[str, Any] | None, name: str) -> Any:
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _scalar(value: Any) -> str:
    """A value in YAML on one line."""
    if value is PydanticUndefined:
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def _first_paragraph(kind: type[Any] | None) -> str:
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split()) if kind is not None else ""


def _type_words(field: FieldInfo) -> str:
    words = _words(field.annotation)
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(item, name)
    ]
    return " ".join([words, *([f"({', '.join(bounds)})"] if bounds else [])])


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_words(arguments[0])}s"
    if origin is dict:
        return "keys and values"
    return _WORDS.get(annotation, str(annotation))
