"""Log lines on stderr: one JSON object each for the launcher, or one readable line for a person."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone


class JsonLines(logging.Formatter):
    """One object per event; what a record carries in `fields` stands beside the fixed keys."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """timestamp, level, message, target, rank, then the event's own fields."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
        event = {"timestamp": when, "level": record.levelname, "message": record.getMessage(), "target": record.name, "rank": self._rank}
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["stack"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class ReadableLines(logging.Formatter):
    """Time, level, target and message, then the event's own fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)5s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with `name=value` for each field."""
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return super().format(record).replace("\n", f"{fields}\n", 1) if record.exc_info else super().format(record) + fields


def configure(*, as_json: bool, rank: int) -> None:
    """Send every record of the process to stderr, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(rank) if as_json else ReadableLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
