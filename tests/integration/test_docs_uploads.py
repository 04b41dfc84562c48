"""The examples of docs/uploads.md, run as they are on every kind of object store."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support import s3_servers
from support.server import server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "uploads.md"


def examples() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("kind", ["filesystem", *s3_servers.kinds()])
def test_the_examples_do_what_the_page_says(kind: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("component: curl")
    settings = {"AETHER_MULTIPART_PART_SIZE_BYTES": str(5 << 20)}
    if kind != "filesystem":
        s3 = s3_servers.running(kind)
        settings |= s3.settings(s3.new_bucket())
    setting_up, one_piece, in_parts, legacy, reading = examples()
    # another artifact for each of the three ways, of three parts
    another = "head -c 12000000 /dev/urandom >app.tar.gz"
    script = [
        another,
        setting_up,
        one_piece,
        another,
        setting_up,
        in_parts,
        reading,
        another,
        setting_up,
        legacy,
        reading,
    ]
    with server(tmp_path / "server", **settings) as up:
        up.api("POST", "/apps", {"name": "shop"})
        environment = {
            **os.environ,
            "AETHER_API_BASE": f"http://127.0.0.1:{up.port}",
            "AETHER_TOKEN": (up.data / "admin-token").read_text().strip(),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        _, listed = up.api("GET", "/artifacts?app=shop")
    answers = [json.loads(line) for line in re.findall(r'\{"artifact_url".*?\}', done.stdout)]
    assert len(answers) == 3
    assert {answer["digest"] for answer in answers} == {artifact["digest"] for artifact in listed["items"]}
