"""The page ``/docs``: every endpoint with its fields, an example and its errors, from the OpenAPI document.

FastAPI's own page loads its program from a server on the internet. Hospitals' networks seldom reach that, and a
browser that shows patients' data should not be told to: so this is plain HTML.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; }
pre { padding: .75rem; overflow-x: auto; background: color-mix(in srgb, currentColor 8%, transparent); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8886; }
section { margin: 2rem 0; }
h3 { margin-bottom: .25rem; }
"""


def add_docs(app: FastAPI) -> None:
    """Serve the page; the document itself stays at ``/openapi.json``."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()))


def render_docs(document: dict[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    info = document["info"]
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["other"])[0]
            by_tag.setdefault(tag, []).append(_operation(document, method.upper(), path, operation))
    sections = [f"<section><h2>{escape(tag)}</h2>{''.join(parts)}</section>" for tag, parts in by_tag.items()]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>"
        f"<p>Machines read <a href=openapi.json>openapi.json</a>.</p>{''.join(sections)}</html>"
    )


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h3><code>{method} {escape(path)}</code></h3>", f"<p>{escape(operation.get('description', ''))}</p>"]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    schema = _resolve(document, content["schema"]) if content else {}
    if "properties" in schema:
        parts.append(_fields(document, schema))
    for example in schema.get("examples", ())[:1]:
        body = json.dumps(example, indent=2)
        command = f"curl -X {method} URL{path} -H 'Content-Type: application/json' -d '\n{body}'"
        parts.append(f"<pre>{escape(command)}</pre>")
    answers = [f"{status} {answer['description']}" for status, answer in operation["responses"].items()]
    parts.append(f"<p><small>{escape(' · '.join(answers))}</small></p>")
    return "".join(parts)


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else f"{json.dumps(field.get('default'))}"
        cells = (f"<code>{escape(name)}</code>", escape(_kind(document, field)), escape(default))
        rows.append(f"<tr><td>{'<td>'.join(cells)}<td>{escape(field.get('description', ''))}")
    return f"<table><tr><th>field<th>type<th>default<th>{''.join(rows)}</table>"


def _kind(document: dict[str, Any], field: dict[str, Any]) -> str:
    """The type in a few words."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_kind(document, option) for option in options)
    if field.get("type") == "array":
        return f"list of {_kind(document, field.get('items', {}))}"
    bounds = [
        f"{word} {field[key]:g}"
        for key, word in (("minimum", "from"), ("maximum", "to"))
        if abs(field.get(key, 1e12)) < 1e12
    ]
    return " ".join([str(field.get("type", "any")), *bounds])


def _resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in schema.get("anyOf", ()):
        if "$ref" in option:
            schema = option
    if "$ref" in schema:
        return dict(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    return schema
