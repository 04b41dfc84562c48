"""Detection: kinds, names, runtimes, start commands, and configuration errors that name file and line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.build import detect as detection
from aether.build.detect import detect
from aether.build.project import Options, Project
from aether.build.semver import admits
from aether.build.tools import Tool
from aether.model.errors import ConfigError


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tool]:
    """The tools of an imagined machine; detection asks for nothing else."""
    found = {"node": Tool("node", ("node",), "20.11.1"), "python3": Tool("python3", ("python3",), "3.11.7")}
    monkeypatch.setattr(detection, "find_tool", lambda name: found.get(name))  # pyright: ignore
    return found


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def found(root: Path, **options: object) -> Project:
    return detect(root, Options(**options))  # pyright: ignore


def test_a_plain_node_app(tmp_path: Path) -> None:
    write(tmp_path, package__json='{"name": "@shop/Web_Front", "scripts": {"start": "node ."}}')
    project = found(tmp_path)
    assert (project.kind, project.app, project.runtime, project.start) == ("node", "web-front", "node20", "npm start")


@pytest.mark.parametrize(
    ("files", "start"),
    [
        (
            {"package__json": '{"scripts":{"start":"x"}}', "Procfile": "web: node p.js\n", "server__js": ""},
            "node p.js",
        ),
        ({"package__json": "{}", "aether__toml": 'start = "node t.js"', "Procfile": "web: node p.js"}, "node t.js"),
        ({"package__json": '{"main":"lib.js"}', "server__js": "", "lib__js": ""}, "node server.js"),
        ({"package__json": '{"main":"lib.js"}', "lib__js": ""}, "node lib.js"),
        ({"package__json": "{}", "index__js": ""}, "node index.js"),
        ({"requirements__txt": "", "app__py": ""}, "python3 app.py"),
        ({"requirements__txt": "", "main__py": "", "app__py": ""}, "python3 main.py"),
        ({"pyproject__toml": "", "Procfile": "# note\n\nweb: gunicorn x\nworker: y"}, "gunicorn x"),
        ({"index__html": ""}, "python3 -m http.server $PORT --directory ."),
        ({"Procfile": "web: ./serve --port $PORT"}, "./serve --port $PORT"),
    ],
)
def test_start_commands(tmp_path: Path, files: dict[str, str], start: str) -> None:
    assert found(write(tmp_path, **files)).start == start
    assert found(tmp_path, start="mine").start == "mine"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing to deploy was found"),
        ({"package__json": '{"name": "x",\n "scripts": {,}}'}, r"package\.json, line 2, column \d+"),
        ({"package__json": "[]"}, "package.json, line 1: an object"),
        ({"package__json": '{"scripts": []}'}, "'scripts' must be a table"),
        ({"package__json": "{}"}, "no start command was found.*Procfile"),
        ({"package__json": "{}", "aether__toml": "app = 'x'\nstart = \n"}, r"aether\.toml, line 2"),
        ({"aether__toml": "a = 1\n[health"}, r"aether\.toml, line 2"),
        ({"aether__toml": "start = 3"}, "'start' must be a string"),
        ({"aether__toml": 'kind = "robot"'}, "kind 'robot' is not known"),
        ({"aether__toml": 'app = "Bad Name"\nstart = "x"'}, "aether.toml: app.*cannot name an app"),
        ({"aether__toml": 'start = "x"\n[health]\npath = "nope"'}, "must start with '/'"),
        ({"aether__toml": 'start = "x"\n[env]\nA = [1]'}, "'A' must be a string"),
        ({"aether__toml": 'start = "x"\n[env]\n"A B" = "1"'}, "'A B' cannot name a variable"),
        ({"aether__toml": '[rollout]\nstrategy = "odd"'}, "rolling, recreate, canary, bluegreen, not 'odd'"),
        ({"aether__toml": '[rollout]\nstep_secs = "long"'}, "'step_secs' must be a number"),
        ({"aether__toml": "[rollout]\nsteps = [true]"}, "'steps' must be a list of percentages"),
        ({"aether__toml": 'runtime = "cobol"'}, "runtime 'cobol' is not known"),
        ({"package__json": "{}", "aether__toml": 'runtime = "node99"'}, "runtime 'node99' is not known"),
        ({"requirements__txt": "", "aether__toml": 'runtime = "python"'}, "runtime 'python' is not known"),
        ({"requirements__txt": ""}, "no start command was found.*'web: python3 FILE.py'"),
        ({"requirements__txt": "", "manage__py": ""}, "manage.py runserver"),
        ({"Procfile": "web ./x"}, "Procfile, line 1"),
        ({"package__json": '{"engines": {"node": ">=99"}, "scripts": {"start": "x"}}'}, "asks for Node.js >=99"),
        ({"package__json": '{"engines": {"node": "lts"}, "scripts": {"start": "x"}}'}, "not a version range"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(write(tmp_path, **files))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(ConfigError, match=r"package\.json is not UTF-8"):
        found(tmp_path)


def test_everything_in_aether_toml(tmp_path: Path) -> None:
    write(
        tmp_path,
        package__json='{"name":"x"}',
        aether__toml='app = "shop"\nstart = "node s"\nruntime = "node22"\nspeed = 1\n'
        '[health]\npath = "/healthz"\n[env]\nA = "1"\nB = 2\n'
        '[rollout]\nstrategy = "canary"\nsteps = [5, 100]\nstep_secs = 2.5\nmax_error_rate = 0.02\nodd = 1\n',
    )
    project = found(tmp_path, env={"A": "flag"})
    assert (project.app, project.runtime, project.health_path) == ("shop", "node22", "/healthz")
    assert project.env == {"A": "flag", "B": "2"}
    assert project.strategy == "canary"
    assert project.rollout == {"steps": [5, 100], "step_secs": 2.5, "max_error_rate": 0.02}
    assert project.notes == tuple(
        f"aether.toml: '{key}' is not known and has no effect" for key in ("rollout.odd", "speed")
    )


def test_the_name_falls_back_to_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "My Shop"
    root.mkdir()
    assert found(write(root, package__json='{"name": "123"}', server__js="")).app == "my-shop"
    assert found(root, app="other").app == "other"
    with pytest.raises(ConfigError, match="--app"):
        found(root, app="Other!")


def test_runtime_by_engines_offer_and_machine(tmp_path: Path, tools: dict[str, Tool]) -> None:
    write(tmp_path, package__json='{"engines": {"node": ">=20"}, "scripts": {"start": "x"}}')
    assert found(tmp_path).runtime == "node20"
    assert found(tmp_path, offered_runtimes=("node18", "node22")).runtime == "node22"
    tools["node"] = Tool("node", ("node",), "23.1.0")
    project = found(tmp_path)
    assert project.runtime == "node24"
    assert "Node.js 23.1.0" not in project.notes
    assert "native modules" in project.notes[0]
    del tools["node"]
    assert found(tmp_path).runtime == "node24"
    with pytest.raises(ConfigError, match="what can be run is 18"):
        found(tmp_path, offered_runtimes=("node18",))
    with pytest.raises(ConfigError, match="does not offer node20"):
        found(tmp_path, runtime="node20", offered_runtimes=("node22",))


def test_a_prebuilt_program(tmp_path: Path) -> None:
    elf = b"\x7fELF\x02\x01\x01" + bytes(11) + (62).to_bytes(2, "little") + bytes(44)
    (tmp_path / "serve").write_bytes(elf)
    with pytest.raises(ConfigError, match="nothing to deploy"):
        found(tmp_path)
    (tmp_path / "serve").chmod(0o755)
    project = found(tmp_path)
    assert (project.kind, project.runtime, project.start) == ("binary", "binary", "./serve")


@pytest.mark.parametrize(
    ("text", "majors"),
    [
        (">=18", [18, 20, 22]),
        ("^20.1", [20]),
        ("20.x", [20]),
        ("18 || 22", [18, 22]),
        (">=18 <21", [18, 20]),
        (">= 18.0.0 < 22", [18, 20]),
        ("~20.3", [20]),
        ("18 - 20", [18, 20]),
        ("*", [18, 20, 22]),
        ("", [18, 20, 22]),
        ("<20", [18]),
        (">20", [22]),
        ("<=20", [18, 20]),
        ("^18.17.0 || >=20.5.0", [18, 20, 22]),
        ("v20", [20]),
        ("20.11.1", [20]),
        (">=20.0.0-rc.1", [20, 22]),
        ("^0.10", []),
        (">22 <22", []),
    ],
)
def test_version_ranges(text: str, majors: list[int]) -> None:
    assert [major for major in (18, 20, 22) if admits(text, major)] == majors


@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_a_version_admits_its_own_major_only(major: int, minor: int, patch: int) -> None:
    for prefix in ("", "=", "v", "^" if major else "=", "~"):
        text = f"{prefix}{major}.{minor}.{patch}"
        assert [one for one in range(62) if admits(text, one)] == [major]


@given(st.text(alphabet="0123456789.xX*^~<>=| -v", max_size=20))
def test_any_range_is_judged_or_refused(text: str) -> None:
    try:
        answer = admits(text, 20)
    except ConfigError:
        return
    assert answer in (True, False)
