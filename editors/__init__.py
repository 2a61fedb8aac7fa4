"""Editing methods. A new one is one file in its family and one line in `METHODS`."""

from __future__ import annotations

from typing import Any

from editors.closed_form.rome import Rome
from editors.method import Editor

METHODS: dict[str, Editor[Any]] = {editor.name: editor for editor in (Rome(),)}
