"""The parts of the sandbox that are plain data: arguments, script, syscall filter, plan, cgroup limits, host view."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.model.errors import BadRequest
from aether.model.instance import InstanceSpec, Limits
from aether.runtimes.process import cgroups, host, sandbox, seccomp
from aether.runtimes.process.cgroups import Group
from aether.runtimes.process.host import HostView
from aether.runtimes.process.record import Record
from aether.runtimes.process.sandbox import Tools
from aether.runtimes.process.shim.plan import NONE, Plan

VIEW = HostView(("/usr",), (("usr/bin", "/bin"),), ("/etc/ssl/certs",), ("/opt/node",), ())


def spec(**changes: object) -> InstanceSpec:
    values: dict[str, object] = {
        "instance_id": "i",
        "app": "demo",
        "deployment_id": "d",
        "release": 1,
        "digest": "0" * 64,
        "root": Path("/data/releases/demo/x"),
        "command": "npm start",
        "port": 3000,
    }
    return InstanceSpec(**(values | changes))  # type: ignore[arg-type]


class TestArguments:
    def test_no_variable_and_no_command_is_among_them(self) -> None:
        given_spec = spec(env={"SECRET": "hunter2"})
        words = sandbox.options(given_spec, VIEW, Path("/etc-made"), as_root=True)
        words += sandbox.command(Tools("/usr/bin/bwrap", "/usr/bin/setpriv"), 200_001)
        assert b"hunter2" not in b" ".join(words)
        assert b"--setenv" not in words

    def test_every_mount_is_read_only_or_a_limited_tmpfs(self) -> None:
        words = [word.decode() for word in sandbox.options(spec(), VIEW, Path("/etc-made"), as_root=False)]
        assert not {"--bind", "--dev-bind", "--bind-try", "--overlay"} & set(words)
        for at, word in enumerate(words):
            if word == "--tmpfs":
                assert words[at - 2] == "--size"
        assert words[-2:] == ["--remount-ro", "/"]

    def test_root_and_user(self) -> None:
        as_root = sandbox.options(spec(), VIEW, Path("/e"), as_root=True)
        as_user = sandbox.options(spec(), VIEW, Path("/e"), as_root=False)
        assert b"--unshare-user" not in as_root
        assert {b"--unshare-user", b"--disable-userns"} <= set(as_user)
        assert b"--cap-add" not in as_user
        assert b"setpriv" not in b" ".join(sandbox.command(Tools("/bwrap", "/setpriv"), None))


class TestEnvironment:
    def test_the_spec_s_variables_win(self) -> None:
        found = sandbox.environment(spec(env={"NODE_ENV": "test", "PATH": "/mine"}), ("/usr/bin",))
        assert (found["NODE_ENV"], found["PATH"], found["HOME"], found["PORT"]) == ("test", "/mine", "/tmp", "3000")
        assert found["NPM_CONFIG_UPDATE_NOTIFIER"] == "false", "npm's news are no part of an app's log"

    @pytest.mark.parametrize("name", ["", "1A", "A B", "A=B", "PPID", "A\n"])
    def test_names_a_shell_cannot_pass_on(self, name: str) -> None:
        with pytest.raises(BadRequest):
            sandbox.environment(spec(env={name: "x"}), ())

    @settings(max_examples=25, deadline=None)
    @given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=60))
    def test_the_shell_gives_back_any_value(self, value: str) -> None:
        text = sandbox.script({"VALUE": value}, 'printf %s "$VALUE"', kind=NONE, folder="/")
        shown = subprocess.run(["/bin/sh", "-c", text.decode()], capture_output=True, check=True)
        assert shown.stdout == value.encode()


class TestPlan:
    @given(
        st.lists(st.binary().map(lambda b: b.replace(b"\0", b"?")), min_size=1),
        st.binary().map(lambda b: b.replace(b"\0", b"=")),
        st.integers(0, 2**40),
    )
    def test_is_read_as_written(self, words: list[bytes], text: bytes, number: int) -> None:
        plan = Plan(
            kind="bubblewrap",
            argv=words,
            options=words[1:],
            script=text,
            filter_hex="00ff",
            cgroups=words[2:],
            memory_events=text,
            log=text,
            log_bytes=number,
            port=3000,
            slirp=b"",
            open_files=1,
            data_bytes=number,
            refused=[b"10.0.0.0/8"] * (number % 3),
            allowed=[b"10.1.0.0/16"] * (number % 2),
        )
        assert vars(Plan.decode(plan.encode())) == vars(plan)


def run_filter(program: bytes, number: int, arch: int, *args: int) -> int:
    """Interpret a seccomp program as the kernel does (only the operations the filter uses)."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *(list(args) + [0] * 6)[:6])
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        kind, if_true, if_false, operand = code[at]
        at += 1
        if kind == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif kind == 0x06:
            return operand
        else:
            met = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[kind]
            at += if_true if met else if_false


ALLOW, EPERM, ENOSYS, EAFNOSUPPORT, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x50061, 0x80000000
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


class TestFilter:
    @pytest.mark.parametrize(
        ("machine", "calls"),
        [
            ("x86_64", {"read": 0, "mount": 165, "clone": 56, "clone3": 435, "ioctl": 16, "socket": 41, "bpf": 321}),
            (
                "aarch64",
                {"read": 63, "mount": 40, "clone": 220, "clone3": 435, "socket": 198, "ioctl": 29, "bpf": 280},
            ),
        ],
    )
    def test_decisions(self, machine: str, calls: dict[str, int]) -> None:
        program, arch = seccomp.program(machine), ARCHES[machine]

        def ask(name: str, *args: int) -> int:
            return run_filter(program, calls[name], arch, *args)

        assert ask("read") == ALLOW
        assert ask("mount") == ask("bpf") == EPERM
        assert ask("clone3") == ENOSYS
        assert ask("clone", 0x3D0F00) == ALLOW  # what a thread is made with
        assert all(ask("clone", flag | 17) == EPERM for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000))
        assert ask("ioctl", 0, 0x5412) == ask("ioctl", 0, 0x541C) == EPERM
        assert ask("ioctl", 0, 0x5401) == ALLOW
        assert [ask("socket", family) for family in (1, 2, 10, 16)] == [ALLOW] * 4
        assert [ask("socket", family) for family in (17, 38, 40)] == [EAFNOSUPPORT] * 3
        assert run_filter(program, calls["read"], 0x40000003) == KILL  # i386 calls

    def test_the_x32_calls_are_closed(self) -> None:
        assert run_filter(seccomp.program("x86_64"), 0x40000000 | 165, ARCHES["x86_64"]) == ENOSYS

    @given(st.integers(0, 600), st.sampled_from(sorted(ARCHES)))
    def test_every_call_gets_a_decision(self, number: int, machine: str) -> None:
        decision = run_filter(seccomp.program(machine), number, ARCHES[machine], 1, 1)
        assert decision in (ALLOW, EPERM, ENOSYS)

    def test_an_unknown_machine(self) -> None:
        assert not seccomp.supported("riscv64")
        with pytest.raises(ValueError, match="riscv64"):
            seccomp.program("riscv64")


class TestCgroups:
    """Version 2 on plain files: folders behave the same, the kernel's part is tested with real instances."""

    def _v2(self, tmp_path: Path) -> tuple[Path, Path]:
        own = tmp_path / "own"
        own.write_text("0::/service\n")
        for base in (tmp_path / "fs" / "service", tmp_path / "fs" / "service" / "aether"):
            base.mkdir(parents=True)
            (base / "cgroup.controllers").write_text("cpu io memory pids\n")
            (base / "cgroup.subtree_control").write_text("")
        (tmp_path / "fs" / "service" / "aether" / "cgroup.subtree_control").write_text("memory cpu pids")
        (tmp_path / "fs" / "cgroup.controllers").write_text("")
        return tmp_path / "fs", own

    def test_limits_are_written(self, tmp_path: Path) -> None:
        root, own = self._v2(tmp_path)
        folder = root / "service" / "aether"
        found = cgroups.Cgroups(folder, frozenset({"memory", "cpu", "pids"}))
        group = found.create("i", Limits(memory_bytes=1000, cpus=1.5, pids=7))
        assert group.folders == (folder / "i",)
        assert (folder / "i" / "memory.max").read_text() == "1000"
        assert (folder / "i" / "cpu.max").read_text() == "150000 100000"
        assert (folder / "i" / "pids.max").read_text() == "7"
        assert found.how("memory") == "cgroup v2"
        assert own.exists()

    def test_zero_is_no_limit(self, tmp_path: Path) -> None:
        found = cgroups.Cgroups(tmp_path, frozenset({"memory", "cpu", "pids"}))
        found.create("i", Limits(memory_bytes=0, cpus=0, pids=0))
        assert list((tmp_path / "i").iterdir()) == []

    def test_nothing_is_found_where_nothing_is(self, tmp_path: Path) -> None:
        assert cgroups.detect(tmp_path, tmp_path / "absent") == cgroups.Cgroups()
        own = tmp_path / "own"
        own.write_text("4:memory:/a\n3:cpu,cpuacct:/a\n0::/a\n")
        assert cgroups.detect(tmp_path / "fs", own) == cgroups.Cgroups()

    def test_memory_kills_are_counted(self, tmp_path: Path) -> None:
        events = tmp_path / "memory.events"
        assert Group((), events).memory_kills() == 0
        events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
        assert Group((), events).memory_kills() == 2


class TestHostView:
    def _toolchain(self, prefix: Path, name: str = "node") -> None:
        (prefix / "bin").mkdir(parents=True)
        (prefix / "lib" / "node_modules").mkdir(parents=True)
        (prefix / "bin" / name).write_bytes(b"\x7fELF")
        (prefix / "bin" / name).chmod(0o755)

    def test_a_toolchain_outside_the_system_is_shown(self, tmp_path: Path) -> None:
        self._toolchain(tmp_path / "nvm" / "v20")
        view = host.survey(tmp_path / "data", {"PATH": f"{tmp_path}/nvm/v20/bin:/usr/bin"})
        assert view.tools[0] == f"{tmp_path}/nvm/v20"
        assert view.path[0] == f"{tmp_path}/nvm/v20/bin"

    def test_a_folder_that_holds_the_data_is_not(self, tmp_path: Path) -> None:
        self._toolchain(tmp_path / "local")
        view = host.survey(tmp_path / "local" / "share" / "aether", {"PATH": f"{tmp_path}/local/bin:/usr/bin"})
        assert f"{tmp_path}/local" not in view.tools

    def test_a_folder_that_is_no_toolchain_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "stuff" / "bin").mkdir(parents=True)
        (tmp_path / "stuff" / "bin" / "node").write_bytes(b"\x7fELF")
        (tmp_path / "stuff" / "bin" / "node").chmod(0o755)
        view = host.survey(tmp_path / "data", {"PATH": f"{tmp_path}/stuff/bin"})
        assert view.tools == ()

    def test_a_version_manager_s_stand_in_is_passed_over(self, tmp_path: Path) -> None:
        self._toolchain(tmp_path / "shims")
        (tmp_path / "shims" / "bin" / "node").write_text("#!/bin/sh\n")
        assert host.survey(tmp_path / "data", {"PATH": f"{tmp_path}/shims/bin"}).tools == ()

    def test_a_data_folder_inside_the_system_is_hidden(self) -> None:
        assert host.survey(Path("/usr/local/aether"), {"PATH": "/usr/bin"}).hidden == ("/usr/local/aether",)


def test_a_record_is_read_back_without_its_variables(tmp_path: Path) -> None:
    kept = Record(spec(env={"SECRET": "x"}, limits=Limits(cpus=0.5)), "bubblewrap", 3000, Group((Path("/c/i"),)))
    kept.write(tmp_path)
    found = Record.read(tmp_path)
    assert found is not None
    assert (found.spec.env, found.spec.limits.cpus, found.group) == ({}, 0.5, kept.group)
    assert "SECRET" not in (tmp_path / "spec.json").read_text()
    assert Record.read(tmp_path / "absent") is None
