"""Configuration files: the YAML loader for training and serving.

``load`` reads a file, applies ``key=value`` overrides and validates the result against a pydantic model. Each error
names the file or key, the value and the fix. ``describe_keys`` lists what a schema accepts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from babydoctor.schema import UserError


class Section(BaseModel):
    """Base of all configuration schemas: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Schema = TypeVar("Schema", bound=BaseModel)


def load(schema: type[Schema], path: str | Path | None, overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML file (None: no file) and apply ``key=value`` overrides, whose values are YAML too.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    values = {} if path is None else read_yaml(path)
    for override in overrides:
        apply_override(values, override, schema)
    return validate(schema, values, source="settings" if path is None else str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. An empty file is an empty mapping.

    Raises:
        UserError: the file cannot be read, is not YAML text, or does not hold keys and values.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        advice = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise UserError(f"the configuration {path} is a folder; give a YAML file{advice}")
    try:
        text = path.read_bytes().decode("utf-8")
        values = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}; the shipped ones are in configs/") from None
    except OSError as error:
        raise UserError(f"the configuration {path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"the configuration {path} is not a text file (byte {error.start} is not UTF-8); give a YAML file"
        ) from None
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"the configuration {path} is not a text file (character {error.position} is {error.character!r}); "
            "give a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_position(error)} is not valid YAML: {_problem(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not {type(values).__name__}")
    return values


def validate(schema: type[Schema], values: dict[str, Any], source: str) -> Schema:
    """Validate nested settings.

    Raises:
        UserError: lists every wrong key and value.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = _explain(schema, error)
        raise UserError("\n".join([f"{source} has {len(lines)} mistake(s):", *lines])) from None


def apply_override(values: dict[str, Any], override: str, schema: type[BaseModel]) -> None:
    """Set one ``key=value`` in nested settings that are not validated yet.

    Raises:
        UserError: no ``=``, an unknown key, or a value that is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        example = next(name for name in known_keys(schema) if "." in name)
        raise UserError(f"{override!r} is not a setting; write key=value, for example {example}=...")
    if not _is_known(schema, key):
        raise UserError(f"{override!r}: {unknown_key(schema, key)}")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(f"{override!r}: {parent!r} holds {section!r}, which has no keys")
    try:
        section[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {_problem(error)}") from None


class Key(NamedTuple):
    """One setting of a schema."""

    name: str
    field: FieldInfo
    section: type[BaseModel] | None
    """The schema of the section that the key holds; None for a plain value."""


def iterate_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of a schema with its full dotted name, each section before its own keys."""
    for name, field in schema.model_fields.items():
        section = None
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
        yield Key(prefix + name, field, section)
        if section is not None:
            yield from iterate_keys(section, f"{prefix}{name}.")


def known_keys(schema: type[BaseModel]) -> list[str]:
    """Every key of a schema with its full dotted name."""
    return [key.name for key in iterate_keys(schema)]


def unknown_key(schema: type[BaseModel], key: str) -> str:
    """The message for a key that does not exist. It suggests similar keys, those of the same section first."""
    keys = known_keys(schema)
    section, _, last = key.rpartition(".")
    siblings = [name for name in keys if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}" if section else name for name in _near(last, [s.rpartition(".")[2] for s in siblings])]
    near += [name for name in keys if name.rpartition(".")[2] == last]
    if not near and not siblings:  # the section itself is mistyped
        near = _near(key, keys)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in reversed(keys)}
        near = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)]
    sentence = f"there is no key {key!r}"
    if near:
        return f"{sentence}; did you mean {' or '.join(repr(name) for name in dict.fromkeys(near))}?"
    if section and siblings:
        return f"{sentence}; {section} has {', '.join(name.rpartition('.')[2] for name in siblings)}"
    return f"{sentence}; `babydoctor config` lists them all"


def _near(name: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=1)


def _is_known(schema: type[BaseModel], key: str) -> bool:
    """True for a key of the schema, and for any key below a free-form mapping such as ``engine``."""
    keys = {known.name: known for known in iterate_keys(schema)}
    if key in keys:
        return True
    parent = keys.get(key.rpartition(".")[0])
    return parent is not None and getattr(parent.field.annotation, "__origin__", None) is dict


def _explain(schema: type[BaseModel], error: ValidationError) -> list[str]:
    """One line per wrong key; the branches of a union (an integer, or ``auto``) become one line."""
    keys = set(known_keys(schema))
    found: dict[str, tuple[list[str], str]] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            found[key] = ([unknown_key(schema, key)], "")
            continue
        if item["type"] == "missing":
            found[key] = ([f"the key {key!r} is missing"], "")
            continue
        while parts and ".".join(parts) not in keys and ".".join(parts[:-1]) in keys and not parts[-1].isdigit():
            parts.pop()  # the name of the union's branch
        key = ".".join(parts)
        message = item["msg"].removeprefix("Value error, ")
        given = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
        messages, _ = found.setdefault(key, ([], given))
        messages.append(message if not key or messages else f"{key}: {message}")
    return [f"  {' or '.join(messages)}{given}" for messages, given in found.values()]


class _Loader(yaml.SafeLoader):
    """YAML as users expect it: ``2e-4`` is a number, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 2e-4 as text because it has no dot. In YAML 1.2 it is a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1},"


def _problem(error: yaml.YAMLError) -> str:
    context, problem = getattr(error, "context", None), getattr(error, "problem", None)
    return " ".join(str(part) for part in (context, problem) if part) or str(error)
