"""Process types as Procfile and aether.toml name them, and the words they are sent in."""

from pathlib import Path

import pytest

from aether.build.config import read_aether_toml, read_procfile
from aether.build.processes import Found, find_processes
from aether.model.errors import ConfigError


def find(root: Path, toml: str = "", procfile: str = "") -> Found:
    (root / "aether.toml").write_text(toml)
    (root / "Procfile").write_text(procfile)
    return find_processes(read_aether_toml(root), read_procfile(root))


def test_a_procfile_names_web_workers_and_the_release_command(tmp_path: Path) -> None:
    found = find(
        tmp_path, procfile="web: node s.js\nworker: node w.js\nclock2: node c.js\nrelease: npm run migrate\n"
    )
    assert found.web == "node s.js"
    assert found.processes == {"worker": {"command": "node w.js"}, "clock2": {"command": "node c.js"}}
    assert found.release_command == {"command": "npm run migrate"}


def test_the_project_file_names_workers_and_cron_processes(tmp_path: Path) -> None:
    found = find(
        tmp_path,
        """
        [processes]
        web = "node s.js"
        worker = "node w.js"
        [processes.slow]
        command = "node slow.js"
        settle_secs = 5
        [processes.report]
        command = "node report.js"
        schedule = "*/5 * * * *"
        timezone = "Mars/Olympus"
        timeout_secs = 60
        missed = "skip"
        [release]
        command = "npm run migrate"
        timeout_secs = 10
        """,
    )
    assert found.web == "node s.js"
    assert found.processes == {
        "worker": {"command": "node w.js"},
        "slow": {"command": "node slow.js", "settle_secs": 5},
        "report": {
            "command": "node report.js", "schedule": "*/5 * * * *", "timezone": "Mars/Olympus", "timeout_secs": 60,
            "missed": "skip",
        },
    }  # fmt: skip
    assert found.release_command == {"command": "npm run migrate", "timeout_secs": 10}
    assert found.notes == ()


def test_the_project_file_comes_before_the_procfile_and_says_so(tmp_path: Path) -> None:
    found = find(
        tmp_path,
        '[release]\ntimeout_secs = 5\n[processes]\nworker = "node new.js"\n[processes.x]\ncommand="x"\nhue="red"\n',
        "worker: node old.js\nrelease: migrate\n",
    )
    assert found.processes["worker"] == {"command": "node new.js"}
    assert found.release_command == {"command": "migrate", "timeout_secs": 5}
    assert len(found.notes) == 2
    assert "'worker'" in found.notes[0]
    assert "processes.x.hue" in found.notes[1]


@pytest.mark.parametrize(
    ("toml", "procfile", "told"),
    [
        ("[processes]\nworker = 3", "", r"\[processes\]: 'worker' must be a command"),
        ("[processes.worker]\nsettle_secs = 3", "", r"\[processes.worker\]: 'command' is missing"),
        ('[processes.worker]\ncommand = "x"\nsettle_secs = "3"', "", "'settle_secs' must be a number"),
        ('[processes.worker]\ncommand = "x"\nsettle_secs = 100', "", "settle_secs must be 0 to 60"),
        ('[processes.worker]\ncommand = "x"\ntimezone = "UTC"', "", "'timezone' is for cron processes"),
        ('[processes.c]\ncommand = "x"\nschedule = "* * * * *"\nsettle_secs = 1', "", "'settle_secs' is for workers"),
        ('[processes.c]\ncommand = "x"\nschedule = "* * *"', "", "processes.c: .* five fields"),
        ('[processes.c]\ncommand = "x"\nschedule = "61 * * * *"', "", "bad minute"),
        ('[processes.c]\ncommand = "x"\nschedule = "0 0 30 2 *"', "", "processes.c: "),
        ('[processes.web]\ncommand = "x"\nschedule = "* * * * *"', "", "web cannot have a schedule"),
        ('[processes]\nBig = "x"', "", "'Big' cannot name a process type"),
        ('[processes]\nrun = "x"', "", "'run' cannot name a process type"),
        ('[processes]\nrelease = "x"', "", "'release' cannot name a process type"),
        ("[release]\ntimeout_secs = 3", "", r"\[release\]: 'command' is missing"),
        ('[release]\ncommand = "x"\ntimeout_secs = 0', "", "release_command.timeout_secs"),
        ("processes = 3", "", "'processes' must be a table"),
        ("", "worker: a\nworker: b\n", "Procfile, line 2: 'worker' is there twice"),
        ("", "WORKER: a\n", "'WORKER' cannot name"),
        ("[processes]\n" + "\n".join(f'w{n} = "x"' for n in range(21)), "", "at most 20"),
    ],
)
def test_slips_are_told_before_anything_is_built(tmp_path: Path, toml: str, procfile: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find(tmp_path, toml, procfile)
