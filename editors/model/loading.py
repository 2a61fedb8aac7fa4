"""A lock: one model is loaded at a time."""

from __future__ import annotations

import threading

LOADING = threading.Lock()
"""Held around `from_pretrained`: transformers switches global state (how weights are tied and initialised)
while it loads, and two loads in two threads can leave it switched."""
