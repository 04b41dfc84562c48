"""Python projects and static folders built for real, and trees of a hundred thousand files."""

import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from aether.build.plan import make, plan
from aether.build.project import Made, Options
from aether.model.errors import BuildFailed, ConfigError
from support.installed import wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aether"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip finds packages in."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    wheel(tmp_path / "wheels", "greet")
    return tmp_path / "wheels"


def built(root: Path, out: Path, **options: object) -> Made:
    return make(plan(root, Options(**options)), out)  # pyright: ignore


def app(root: Path, **files: str) -> Path:
    root.mkdir()
    for name, content in {"app.py": "import greet; greet.main()", **files}.items():
        (root / name).write_text(content)
    return root


def unpacked(made: Made, tmp_path: Path) -> Path:
    folder = tmp_path / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["tar", "xzf", made.packed.artifact, "-C", folder], check=True)
    return folder


def test_requirements_are_installed_and_cached(tmp_path: Path, index: Path) -> None:
    root = app(tmp_path / "app", **{"requirements.txt": "-r more.txt\n", "more.txt": "greet==1.0\n"})
    made = built(root, tmp_path / "out")
    assert made.plan.project.runtime == f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = unpacked(made, tmp_path)
    packages = folder / ".aether" / "python"
    env = {"PYTHONPATH": str(packages), "PATH": f"{packages / 'bin'}:{Path(sys.executable).parent}:/usr/bin"}
    for command in (["python3", "app.py"], ["greet"]):
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == "greet 1.0\n"
    assert (packages / "bin" / "greet").read_text().startswith("#!/usr/bin/env python3\n")
    assert list(packages.glob("__pycache__/greet.*.pyc"))
    again = built(root, tmp_path / "out")
    assert again.prepared.cached
    assert again.packed.digest == made.packed.digest
    fresh = built(root, tmp_path / "out", cache=False)
    assert fresh.packed.content_digest == made.packed.content_digest
    wheel(index, "greet", "2.0")
    (root / "more.txt").write_text("greet==2.0\n")
    third = built(root, tmp_path / "out")
    assert not third.prepared.cached
    assert "2.0" in (unpacked(third, tmp_path) / ".aether" / "python" / "greet.py").read_text()


def test_dependencies_of_pyproject(tmp_path: Path, index: Path) -> None:
    root = app(tmp_path / "app", **{"pyproject.toml": '[project]\nname = "x"\ndependencies = ["greet"]\n'})
    assert index.is_dir()
    made = built(root, tmp_path / "out")
    assert (unpacked(made, tmp_path) / ".aether" / "python" / "greet.py").is_file()


def test_environments_and_bytecode_of_this_machine_stay_here(tmp_path: Path) -> None:
    root = app(tmp_path / "app", **{"requirements.txt": ""})
    (root / "env").mkdir()
    (root / "env" / "pyvenv.cfg").write_text("home = /usr")
    (root / "pkg" / "__pycache__").mkdir(parents=True)
    (root / "pkg" / "__pycache__" / "x.pyc").write_bytes(b"x")
    found = {item.path: item.reason for item in plan(root).excluded}
    assert found == {"env/": "a virtual environment of this machine", "pkg/__pycache__/": "bytecode of this machine"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"requirements.txt": "-r gone.txt"}, r"includes 'gone\.txt', which is not there"),
        ({"pyproject.toml": "[project]\ndependencies = 3"}, "'dependencies' must be a list"),
        ({"pyproject.toml": "[tool.poetry]\nname = 'x'"}, "poetry export"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(app(tmp_path / "app", **files))


def test_a_requirement_that_cannot_be_met_shows_what_pip_says(tmp_path: Path, index: Path, cache: Path) -> None:
    assert index.is_dir()
    with pytest.raises(BuildFailed, match=r"pip install failed[\s\S]*no-such-thing"):
        built(app(tmp_path / "app", **{"requirements.txt": "no-such-thing"}), tmp_path / "out")
    assert [path for path in (cache / "deps").iterdir() if path.suffix != ".lock"] == []


def test_a_static_folder(tmp_path: Path) -> None:
    (tmp_path / "site" / "img").mkdir(parents=True)
    (tmp_path / "site" / "index.html").write_text("<p>hello")
    (tmp_path / "site" / ".env").write_text("SECRET=1")
    made = built(tmp_path / "site", tmp_path / "out")
    with tarfile.open(made.packed.artifact) as archive:
        assert archive.getnames() == ["img", "index.html"]


def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    root = tmp_path / "site"
    for number in range(1000):
        folder = root / "node_modules" / f"p{number}"
        folder.mkdir(parents=True)
        for part in range(100):
            (folder / f"f{part}.js").touch()
    (root / "index.html").write_text("x")
    (root / ".aetherignore").write_text("*.md\ndocs/\n!docs/keep.md\n")
    started = time.process_time()
    found = plan(root)
    assert len(found.entries) == 101_003
    # the bound is loose; a regular expression per file and pattern would take tens of seconds
    assert time.process_time() - started < 10
    made = make(found, tmp_path / "out")
    assert made.packed.files == 100_002
