"""Ctrl-C, where a half-done change must not stay."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

# What the signal module wraps into enumerations, at ten times the cost.
_handler, _set_handler, _SIGINT = unwrap(signal.getsignal), unwrap(signal.signal), int(signal.SIGINT)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is over."""
    handler = _handler(_SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    _set_handler(_SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        _set_handler(_SIGINT, handler)
    if waiting:
        handler(*waiting[0])
