"""Logging that costs nothing until something is logged. Layer: below everything.

structlog (65 ms to import on a slow machine) is loaded by the first message that passes the threshold. Messages go to
stderr, for people or as JSON; nothing logs per exit.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class _Config:
    threshold = LEVELS["warning"]
    json = False
    backend: Any = None


def configure(level: str = "warning", *, json: bool = False) -> None:
    """Set the threshold (a key of LEVELS) and the format of this process's messages."""
    _Config.threshold = LEVELS[level]
    _Config.json = json
    _Config.backend = None


def enabled(level: str) -> bool:
    """Whether messages of this level are written: ask before computing something costly for one."""
    return LEVELS[level] >= _Config.threshold


def debug(event: str, **facts: object) -> None:
    """Log at level debug: `event` is a fixed short text, facts are what varies."""
    _log("debug", event, facts)


def info(event: str, **facts: object) -> None:
    """Log at level info."""
    _log("info", event, facts)


def warning(event: str, **facts: object) -> None:
    """Log at level warning."""
    _log("warning", event, facts)


def error(event: str, **facts: object) -> None:
    """Log at level error."""
    _log("error", event, facts)


def _log(level: str, event: str, facts: dict[str, object]) -> None:
    if LEVELS[level] < _Config.threshold:
        return
    if _Config.backend is None:
        _Config.backend = _make_backend()
    getattr(_Config.backend, level)(event, **facts)


def _make_backend() -> Any:
    import structlog

    renderer = (
        structlog.processors.JSONRenderer()
        if _Config.json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    return structlog.wrap_logger(
        structlog.PrintLogger(file=sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
    )
