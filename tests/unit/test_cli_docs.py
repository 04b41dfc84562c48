"""The reference of the command line is what the parsers say, and troubleshooting names only codes that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from aether.cli.main import verbs
from aether.model import errors

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "make_cli_docs.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"### `aether {verb}`" in text for verb in verbs())


def codes(base: type[errors.AetherError]) -> set[str]:
    return {base.code}.union(*(codes(child) for child in base.__subclasses__()))


def test_troubleshooting_names_every_code_and_no_other() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "aether").rglob("*.py"))
    wanted = codes(errors.AetherError) - {errors.ClientError.code} | {errors.AetherError.code, "interrupted"}
    assert wanted <= described, f"not described: {sorted(wanted - described)}"
    assert all(f'"{code}"' in source for code in described), "a code that nothing says"
