"""State that the browser stores for a tab: its token, typed text, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from babydoctor.serve.page.handlers import Changes
from babydoctor.serve.page.layout import Layout


def tab_values(text: Any) -> dict[str, Any]:
    """The state of a tab that ``restore`` in ``page.js`` sends; empty if it is malformed."""
    try:
        values = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def kept_boxes(ui: Layout) -> list[Any]:
    """The text boxes whose content survives a reload. The browser stores it by ``elem_id``."""
    return [ui.question, ui.technique, ui.findings, ui.impression, ui.comment]


def typed_texts(ui: Layout, values: Mapping[str, Any]) -> Changes:
    """Restore the typed text, whether or not the server still knows the tab. An empty box is left as it is."""
    texts = values.get("texts")
    if not isinstance(texts, dict):
        return {}
    return {box: str(texts[box.elem_id]) for box in kept_boxes(ui) if texts.get(box.elem_id)}


def stored_settings(ui: Layout, preferences: Any) -> tuple[str | None, Changes]:
    """Restore the model and the settings that this browser used last."""
    if not isinstance(preferences, list) or len(preferences) != 4:
        return None, {}
    model, *numbers = preferences
    boxes = (ui.temperature, ui.top_p, ui.max_tokens)
    changes: Changes = {
        box: float(number)
        for box, number in zip(boxes, numbers, strict=True)
        if isinstance(number, (int, float)) and box.minimum <= number <= box.maximum
    }
    return (model if isinstance(model, str) and model else None), changes
