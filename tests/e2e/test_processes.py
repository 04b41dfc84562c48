"""An app with web, worker, release command and cron, from the command line: deployed, scaled, broken, rolled back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from support.product import Product, copy_example

APP = "hello-processes"


def wait_for(what: Callable[[], object], secs: float = 40.0) -> object:
    deadline = time.monotonic() + secs
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    return found


def test_an_app_with_all_kinds_of_processes(own: Product, tmp_path: Path) -> None:
    project = copy_example("processes", tmp_path / "processes")
    dry = own.run("deploy", str(project), "--dry-run").stdout
    assert "worker: worker, started by 'node worker.js'" in dry
    assert "report: cron '* * * * *', started by 'node report.js'" in dry
    assert "release command 'node migrate.js'" in dry

    assert own.deploy(project).json["status"] == "active"
    assert own.get(APP) == (200, "Hello from web\n")
    migrated = own.run("logs", "--app", APP, "--process", "release").stdout.splitlines()
    assert len(migrated) == 1
    assert migrated[0].split()[2].startswith("release.")
    assert migrated[0].endswith("schema is up to date")
    lines = [json.loads(line) for line in own.run("logs", "--app", APP, "--format", "json").stdout.splitlines()]
    assert {"release", "web", "worker"} <= {line["process"] for line in lines}
    status = own.run("status", "--app", APP).stdout
    assert "1 of 1 ready" in status
    assert "at '* * * * *' UTC, next " in status

    scaled = own.run("scale", "worker=2", "--app", APP).stdout.strip()
    assert scaled == f"{APP}: web 1 of 1 ready, worker 2 of 2 ready, report waiting for its time"
    unknown = own.run("scale", "clerk=2", "--app", APP, check=False)
    assert unknown.code != 0
    assert "there is no process type 'clerk'; there is web, worker, report" in unknown.stderr

    (project / "migrate.js").write_text("console.error('no such column'); process.exit(1);\n")
    failed = own.run("deploy", str(project), check=False)
    assert failed.code == 50
    assert "the release command 'node migrate.js' exited with code 1" in failed.stderr
    assert "| no such column" in failed.stderr
    assert "v1 keeps serving" in failed.stderr

    (project / "migrate.js").write_text("console.log('done');\n")
    (project / "worker.js").write_text("process.exit(3);\n")
    failed = own.run("deploy", str(project), check=False)
    assert failed.code == 50
    assert "process type 'worker' exited with code 3" in failed.stderr

    (project / "Procfile").write_text("web: node server.js\n")
    (project / "aether.toml").write_text(f'app = "{APP}"\n')
    assert own.deploy(project).json["status"] == "active"
    difference = own.run("releases", "diff", "v1", "v2", "--app", APP).stdout
    assert "node worker.js" in difference
    assert "release_command" in difference
    assert "worker" not in own.run("scale", "--app", APP).stdout

    own.run("rollback", "--app", APP)
    own.kill9()
    own.start()
    wait_for(lambda: "worker 2 of 2 ready" in own.run("scale", "--app", APP).stdout)
    ran = wait_for(lambda: own.run("logs", "--app", APP, "--process", "report").stdout, 90)
    assert "report of 2" in str(ran)
    wait_for(lambda: "succeeded" in own.run("status", "--app", APP).stdout)


def test_what_is_wrong_is_told_before_anything_is_built(up: Product, tmp_path: Path) -> None:
    project = copy_example("processes", tmp_path / "wrong")
    (project / "aether.toml").write_text('app = "wrong"\n[processes.report]\ncommand = "x"\nschedule = "every day"\n')
    done = up.run("deploy", str(project), check=False)
    assert done.code == 10
    assert "processes.report: 'every day' is no schedule: five fields are wanted" in done.stderr
    (project / "aether.toml").write_text(
        'app = "wrong"\n[processes.report]\ncommand = "x"\nschedule = "* * * * *"\ntimezone = "Berlin"\n'
    )
    done = up.run("deploy", str(project), check=False)
    assert done.code != 0
    assert "'Berlin' is no time zone" in done.stderr
