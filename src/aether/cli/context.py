"""What every verb gets: the log, the way results are printed, and the API of the chosen server."""

from __future__ import annotations

import os

from aether.cli.log import Log
from aether.cli.output import write, write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aether.client.api import Api


class Context:
    """One call of one verb. Use as a context manager: it closes the connection."""

    def __init__(
        self,
        *,
        log_level: str = "info",
        log_format: str = "auto",
        as_json: bool = False,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.log = Log(log_level, log_format)
        self.as_json = as_json
        self.environ = environ
        self._api: Api | None = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        if self._api is not None:
            self._api.close()

    @property
    def api(self) -> Api:
        """The server that the environment, the session and config.toml point at. Raises ConfigError."""
        if self._api is None:
            from aether.client.api import connect

            on_event = self.note if self.log.shows("debug") else None
            self._api = connect(self.environ, on_event=on_event)
        return self._api

    def note(self, event: str, fields: dict[str, object]) -> None:
        """A transport's event as a debug message."""
        self.log.write("debug", event, fields)

    def result(self, content: object, text: Callable[[], str]) -> None:
        """Print a result: `content` as JSON, or `text()`."""
        if self.as_json:
            write_json(content)
        elif shown := text():
            write(shown)
