"""Tools that are there and do not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from aether.build.tools import find_tool
from aether.model.errors import ConfigError

TRACE = """\
/opt/corepack.cjs:22036
      throw new Error(`cannot download`);
            ^

Error: Corepack cannot download the latest version of pnpm
    at fetchLatestStableVersion (/opt/corepack.cjs:22036:13)

Node.js v20.20.2
"""


def test_a_broken_tool_is_told_by_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "corepack"
    program.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{TRACE}END\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as raised:
        find_tool("pnpm", (str(program), "pnpm"))
    assert "said: Error: Corepack cannot download the latest version of pnpm;" in raised.value.message
    assert "npm install -g pnpm" in raised.value.message
