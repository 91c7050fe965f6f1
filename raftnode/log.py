"""Logs: structlog over the standard library's logging, so that a program that embeds a node decides where they go.

The command line calls `setup`: readable lines on a terminal, JSON elsewhere, always on stderr. What is logged: role
changes, elections, members that come and go, slow syncs, refusals. Never keys or values. Layer 2.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from raftnode.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def get_logger(name: str, **facts: Any) -> Any:
    """The logger `raftnode.<name>`; `facts` are in each of its lines."""
    return structlog.wrap_logger(
        logging.getLogger(f"raftnode.{name}"),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind(**facts)


def setup(level: str = "info", stream: TextIO = sys.stderr, as_json: bool | None = None) -> None:
    """Send the logs of raftnode to `stream`: JSON, one object a line, unless it is a terminal (or as `as_json` says).
    Raises ConfigError for a level that is not in LEVELS."""
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r}: there are {', '.join(LEVELS)}")
    is_terminal = stream.isatty()
    render_json = not is_terminal if as_json is None else as_json
    renderer: Any = (
        structlog.processors.JSONRenderer() if render_json else structlog.dev.ConsoleRenderer(colors=is_terminal)
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
        )
    )
    logger = logging.getLogger("raftnode")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
