"""Render the images of an exported session again, and ask its questions again."""

from __future__ import annotations
