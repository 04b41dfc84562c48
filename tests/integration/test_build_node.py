"""Node.js projects built for real: npm, yarn and pnpm, the cache of dependencies, builds, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from aether.build.plan import make, plan
from aether.build.project import Made, Options, Target
from aether.model.errors import BuildFailed, ConfigError

TOOLS = Path(os.environ.get("AETHER_TEST_CACHE", Path.home() / ".cache" / "aether-tests")) / "managers"
BERRY = TOOLS.with_name("berry")

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="component: npm")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aether"


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yarn (classic) and pnpm on PATH, installed once by npm into the tests' own cache."""
    bin_folder = TOOLS / "node_modules" / ".bin"
    for folder, packages in ((TOOLS, ["yarn@1", "pnpm@9"]), (BERRY, ["@yarnpkg/cli-dist@4"])):
        if (folder / "node_modules").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"component: yarn and pnpm from npm ({done.stderr.strip().splitlines()[-1]})")
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")


def project(root: Path, package: dict[str, object], **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "package.json").write_text(json.dumps({"name": "shop", "version": "1.0.0", **package}))
    for name, content in {"server.js": "console.log(1)", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def local_package(root: Path, name: str, **fields: object) -> Path:
    """A package inside the project, so that installing it needs no network."""
    folder = root / "libs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": "1.0.0", **fields}))
    (folder / "index.js").write_text(f"module.exports = '{name}'")
    return folder


def lock(root: Path) -> Path:
    subprocess.run(
        ["npm", "install", "--package-lock-only", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    return root


def built(root: Path, out: Path, lines: list[str] | None = None, **options: object) -> Made:
    seen = lines if lines is not None else []
    return make(plan(root, Options(**options)), out, on_line=seen.append)  # pyright: ignore


def contents(made: Made) -> dict[str, str]:
    with tarfile.open(made.packed.artifact) as archive:
        return {
            member.name: (file.read().decode("utf-8", "replace") if (file := archive.extractfile(member)) else "")
            for member in archive
            if member.isfile()
        }


def state(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.lstat().st_mtime_ns for path in root.rglob("*")}


def test_npm_ci_then_the_cache_then_a_new_lockfile(tmp_path: Path, cache: Path) -> None:
    root = project(tmp_path / "app", {"dependencies": {"is-number": "7.0.0"}, "devDependencies": {"is-odd": "3.0.1"}})
    lock(root)
    (root / "node_modules" / "mine").mkdir(parents=True)
    (root / "node_modules" / "mine" / "x").write_text("the user's own")
    before = state(root)
    first = built(root, tmp_path / "out")
    assert not first.prepared.cached
    names = set(contents(first))
    assert "node_modules/is-number/index.js" in names
    assert not any("is-odd" in name or "mine" in name for name in names)
    assert state(root) == before
    lines: list[str] = []
    second = built(root, tmp_path / "out", lines)
    assert second.prepared.cached
    assert lines == []
    assert second.packed.digest == first.packed.digest
    (root / "server.js").write_text("console.log(2)")
    assert built(root, tmp_path / "out").prepared.cached
    package = json.loads((root / "package.json").read_text())
    (root / "package.json").write_text(json.dumps({**package, "description": "says nothing to npm"}))
    assert built(root, tmp_path / "out").prepared.cached
    (root / "package.json").write_text(json.dumps({**package, "dependencies": {"is-number": "6.0.0"}}))
    lock(root)
    third = built(root, tmp_path / "out")
    assert not third.prepared.cached
    assert '"6.0.0"' in contents(third)["node_modules/is-number/package.json"]
    assert not built(root, tmp_path / "out", cache=False).prepared.cached
    assert not list((cache / "deps").glob("*.part"))


def test_a_warm_cache_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-number": "7.0.0"}}))
    built(root, tmp_path / "out")

    def refuse(*command: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {command}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    made = built(root, tmp_path / "out")
    assert made.prepared.cached
    assert made.timings_ms["install"] < 1000


def test_no_lockfile_is_said(tmp_path: Path) -> None:
    root = project(tmp_path / "app", {"dependencies": {"is-number": "^7.0.0"}})
    made = built(root, tmp_path / "out")
    assert "no lockfile" in made.plan.project.notes[0]
    assert made.plan.steps[0].startswith("npm install")
    assert "node_modules/is-number/index.js" in contents(made)
    assert not (root / "package-lock.json").exists()


def test_no_dependencies_need_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = built(project(tmp_path / "app", {}), tmp_path / "out")
    assert made.plan.steps == ()
    assert set(contents(made)) == {"package.json", "server.js"}


def test_a_broken_lockfile_shows_what_npm_says(tmp_path: Path, cache: Path) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-number": "7.0.0"}}))
    package = json.loads((root / "package.json").read_text())
    (root / "package.json").write_text(json.dumps({**package, "dependencies": {"is-number": "6.0.0"}}))
    with pytest.raises(BuildFailed, match=r"npm ci failed with exit code 1") as caught:
        built(root, tmp_path / "out")
    assert "is-number@6.0.0" in caught.value.message
    assert caught.value.details
    assert len(caught.value.details["log_tail"]) <= 20
    (root / "package-lock.json").write_text("{ not json")
    with pytest.raises(BuildFailed, match=r"npm ci failed"):
        built(root, tmp_path / "out")
    assert [path for path in (cache / "deps").iterdir() if path.suffix != ".lock"] == []
    assert not (tmp_path / "out").exists()


def test_install_scripts_see_nothing_of_aether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHER_TOKEN", "secret-token")
    monkeypatch.setenv("aether_other", "secret-other")
    monkeypatch.setenv("PLAIN", "visible")
    dump = "node -e \"require('fs').writeFileSync('env.json', JSON.stringify(process.env))\""
    root = project(
        tmp_path / "app", {"dependencies": {"dep": "file:dep-1.0.0.tgz"}, "scripts": {"postinstall": dump}}
    )
    library = local_package(tmp_path / "elsewhere", "dep", scripts={"install": dump})
    subprocess.run(["npm", "pack", "--pack-destination", root, library], check=True, capture_output=True)
    lock(root)
    found = contents(built(root, tmp_path / "out"))
    for name in ("node_modules/dep/env.json", "env.json"):
        assert "visible" in found[name]
        assert "secret" not in found[name]
    without = contents(built(root, tmp_path / "out", ignore_scripts=True))
    assert "node_modules/dep/index.js" in without
    assert not [name for name in without if name.endswith("env.json")]
    assert not (root / "env.json").exists()


def test_a_build_runs_beside_the_project_and_is_pruned(tmp_path: Path) -> None:
    script = "require('is-odd');require('fs').mkdirSync('dist');require('fs').writeFileSync('dist/out.js','built')"
    root = project(
        tmp_path / "app",
        {
            "scripts": {"build": "node build.js", "start": "node dist/out.js", "prepare": "echo prepared > prep.txt"},
            "dependencies": {"is-number": "7.0.0"},
            "devDependencies": {"is-odd": "3.0.1"},
        },
        **{"build.js": script, ".gitignore": "dist\nnode_modules\n", ".env": "SECRET=1"},
    )
    lock(root)
    before = state(root)
    lines: list[str] = []
    made = built(root, tmp_path / "out", lines)
    found = contents(made)
    assert found["dist/out.js"] == "built"
    assert found["prep.txt"] == "prepared\n"
    assert "node_modules/is-number/index.js" in found
    assert not [name for name in found if "node_modules/is-odd/" in name or name.startswith(".env")]
    assert state(root) == before
    assert [step.split()[1] for step in made.plan.steps] == ["ci", "run", "run", "prune"]
    again = built(root, tmp_path / "out")
    assert again.packed.content_digest == made.packed.content_digest


def test_a_failing_build_shows_its_last_lines(tmp_path: Path, cache: Path) -> None:
    root = project(tmp_path / "app", {"scripts": {"build": "node build.js"}}, **{
        "build.js": "for (let i = 0; i < 50; i++) console.log('line', i); console.error('it broke'); process.exit(3)",
    })  # fmt: skip
    lines: list[str] = []
    with pytest.raises(BuildFailed, match=r"npm run build failed with exit code 3") as caught:
        built(root, tmp_path / "out", lines)
    assert "it broke" in caught.value.message
    assert "line 10\n" not in caught.value.message
    assert "line 10" in lines
    assert not [path for path in (cache / "builds").iterdir() if path.suffix != ".lock"]
    assert not (tmp_path / "out").exists()


def test_a_build_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    root = project(tmp_path / "app", {"scripts": {"build": f"sleep 600 & echo $! > {pids}; echo started; wait"}})
    with pytest.raises(BuildFailed, match="took longer than 3 s") as caught:
        built(root, tmp_path / "out", timeout_s=3.0)
    assert "started" in caught.value.message
    assert gone(int(pids.read_text()))


def gone(pid: int) -> bool:
    """True once the process has ended (a zombie waits only for whoever adopted it)."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_ctrl_c_ends_the_build_and_its_children(tmp_path: Path, cache: Path) -> None:
    pids = tmp_path / "pids"
    root = project(tmp_path / "app", {"scripts": {"build": f"sleep 600 & echo $! > {pids}; echo started; wait"}})
    program = (
        "import sys; from pathlib import Path; from aether.build.plan import make, plan\n"
        "make(plan(Path(sys.argv[1])), Path(sys.argv[2]), on_line=lambda line: print(line, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, root, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    for line in child.stdout:
        if line.strip() == "started":
            child.send_signal(signal.SIGINT)
            break
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert gone(int(pids.read_text()))
    assert not [path for path in (cache / "builds").iterdir() if path.suffix != ".lock"]
    assert not (tmp_path / "out").exists()


def test_two_deploys_at_once_install_once(tmp_path: Path) -> None:
    root = lock(project(tmp_path / "app", {"dependencies": {"is-number": "7.0.0"}}))
    other = shutil.copytree(root, tmp_path / "other")
    made: list[Made] = []
    threads = [threading.Thread(target=lambda where=where: made.append(built(where, tmp_path / where.name / "o")))
               for where in (root, other)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.prepared.cached for one in made) == [False, True]
    assert made[0].packed.content_digest == made[1].packed.content_digest


def test_workspaces_and_local_packages(tmp_path: Path) -> None:
    root = project(tmp_path / "app", {
        "workspaces": ["packages/*"],
        "dependencies": {"@shop/a": "1.0.0", "lib": "file:libs/lib"},
    }, **{
        "packages/a/package.json": json.dumps(
            {"name": "@shop/a", "version": "1.0.0", "bin": "cli.js", "dependencies": {"is-number": "6.0.0"}}
        ),
        "packages/a/index.js": "module.exports = 'a'",
        "packages/a/cli.js": "#!/usr/bin/env node\n",
    })  # fmt: skip
    local_package(root, "lib")
    (root / "server.js").write_text("console.log(require('@shop/a'), require('lib'), require('is-number')(1))")
    lock(root)
    made = built(root, tmp_path / "out")
    with tarfile.open(made.packed.artifact) as archive:
        links = {member.name: member.linkname for member in archive if member.issym()}
    assert links["node_modules/@shop/a"] == "../../packages/a"
    assert links["node_modules/lib"] == "../libs/lib"
    run_packed(made, tmp_path, "a lib true")


def run_packed(made: Made, tmp_path: Path, expected: str) -> None:
    folder = tmp_path / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["tar", "xzf", made.packed.artifact, "-C", folder], check=True)
    done = subprocess.run(["node", "server.js"], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_dependency_outside_the_project_is_refused(tmp_path: Path) -> None:
    local_package(tmp_path, "lib")
    root = project(tmp_path / "app", {"dependencies": {"lib": "file:../libs/lib"}})
    with pytest.raises(ConfigError, match=r"'lib' is at '\.\./libs/lib', outside of the project"):
        plan(root)


@pytest.mark.usefixtures("managers")
@pytest.mark.parametrize("name", ["yarn", "pnpm", "berry"])
def test_yarn_and_pnpm(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project(
        tmp_path / "app",
        {
            "dependencies": {"is-odd": "3.0.1", "near": "file:./libs/near"},
            "devDependencies": {"is-number": "7.0.0"},
            "scripts": {"build": "node -e \"require('is-number'); require('fs').writeFileSync('made.txt', 'yes')\""},
        },
        **{"server.js": "console.log(require('is-odd')(3) && require('near') === 'near')"},
    )
    near = local_package(root, "near")
    lockfile = {"yarn": "yarn.lock", "pnpm": "pnpm-lock.yaml", "berry": "yarn.lock"}[name]
    command = [name, "install", "--ignore-scripts"]
    if name == "berry":
        monkeypatch.setenv("YARN_GLOBAL_FOLDER", str(tmp_path / "berry"))
        (root / ".yarn" / "releases").mkdir(parents=True)
        shutil.copy(BERRY / "node_modules/@yarnpkg/cli-dist/bin/yarn.js", root / ".yarn/releases/yarn.cjs")
        (root / ".yarnrc.yml").write_text("yarnPath: .yarn/releases/yarn.cjs\nnodeLinker: node-modules\n")
        (root / "yarn.lock").touch()
        command = ["node", ".yarn/releases/yarn.cjs", "install", "--no-immutable"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    shutil.rmtree(root / "node_modules")
    made = built(root, tmp_path / "out")
    found = contents(made)
    assert found["made.txt"] == "yes"
    assert lockfile in found
    assert not [name for name in found if name.endswith("node_modules/is-number/package.json") and '"7.0.0"' in name]
    run_packed(made, tmp_path, "true")
    plain = json.loads((root / "package.json").read_text())
    del plain["scripts"]
    (root / "package.json").write_text(json.dumps(plain))
    first, second = built(root, tmp_path / "out"), built(root, tmp_path / "out")
    assert (first.prepared.cached, second.prepared.cached) == (False, True)
    run_packed(second, tmp_path, "true")
    (near / "index.js").write_text("module.exports = 'nearer'")
    if name == "berry":
        with pytest.raises(BuildFailed, match="The lockfile would have been modified"):
            built(root, tmp_path / "out")
    else:
        run_packed(built(root, tmp_path / "out"), tmp_path, "false")
    (root / lockfile).write_text((root / lockfile).read_text().replace("is-odd", "is-even"))
    with pytest.raises(BuildFailed, match=r"install failed"):
        built(root, tmp_path / "out")


def test_a_manager_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}, **{"pnpm-lock.yaml": ""})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="uses pnpm, which is not on PATH: run 'npm install --global pnpm'"):
        plan(root)


def test_a_native_module_for_another_machine_is_refused_before_packing(tmp_path: Path) -> None:
    root = project(tmp_path / "app", {"dependencies": {"lib": "file:libs/lib"}})
    library = local_package(root, "lib")
    (library / "build" / "Release").mkdir(parents=True)
    shutil.copy(shutil.which("node") or "", library / "build" / "Release" / "x.node")
    lock(root)
    with pytest.raises(ConfigError, match=r"is built for Linux .* the server runs Linux arm64"):
        built(root, tmp_path / "out", target=Target(cpu="arm64"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_everything_and_runs_nothing(tmp_path: Path, cache: Path) -> None:
    root = project(tmp_path / "app", {"dependencies": {"is-odd": "3.0.1"}}, **{".env": "X=1"})
    found = plan(root)
    assert [entry.name for entry in found.entries] == [b"package.json", b"server.js"] or len(found.entries) == 2
    assert [(item.path, item.reason.split(",")[0]) for item in found.excluded] == [(".env", "environment file")]
    assert not (cache / "deps").exists()
