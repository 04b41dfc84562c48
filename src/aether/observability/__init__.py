"""What operators see: logs, metrics and trace ids.

structlog loads rich wherever it is installed, for coloured tracebacks that are never drawn here; that was
two thirds of its import time (140 ms) and 5 MB in every server. So rich is hidden while structlog is loaded.
"""

import importlib
import sys


def _load_structlog_without_rich() -> None:
    if "rich" in sys.modules or "structlog" in sys.modules:
        return
    hidden: dict[str, object] = {"rich": None}  # None makes `import rich` fail as if it were not installed
    sys.modules.update(hidden)  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        importlib.import_module("structlog")
    finally:
        del sys.modules["rich"]


_load_structlog_without_rich()
