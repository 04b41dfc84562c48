"""The pure parts of microVMs: what guests are told and how, who may have it, what a monitor is called with."""

from __future__ import annotations

from base64 import b64decode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.model.errors import BadRequest
from aether.runtimes.microvm.assignment import MAX_BYTES, encode
from aether.runtimes.microvm.boot import KVM, TCG, kernel_arguments
from aether.runtimes.microvm.command import command_line, making_command_line, restoring_command_line
from aether.runtimes.microvm.guest.initramfs import initramfs
from aether.runtimes.microvm.guest.kernel import depends
from aether.runtimes.microvm.metadata import Metadata

TTL = {"x-metadata-token-ttl-seconds": "60"}
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True)


@given(st.lists(WORDS, min_size=1, max_size=5), st.dictionaries(NAMES, WORDS, max_size=5))
def test_an_assignment_says_everything_and_nothing_else(argv: list[str], env: dict[str, str]) -> None:
    records = b64decode(encode(argv, env, port=80, secret="s3", time_ns=7)).decode().split("\0")
    assert records[0] == "v=1"
    assert records[-2:] == ["z=", ""]
    assert [record[2:] for record in records if record.startswith("a=")] == argv
    assert dict(record[2:].split("=", 1) for record in records if record.startswith("e=")) == env
    assert {"s=s3", "t=7", "p=80"} <= set(records)


def test_an_assignment_that_a_guest_could_not_be_given_names_no_value() -> None:
    with pytest.raises(BadRequest, match=str(MAX_BYTES)) as caught:
        encode(["a"], {"SECRET": "hush" * 20_000}, port=80, secret="s", time_ns=0)
    assert "hush" not in str(caught.value)
    for env in ({"A=B": "1"}, {"": "1"}, {"A": "\0"}, {"A\n": ""}, {"Ä": ""}, {f"A{n}": "" for n in range(1025)}):
        with pytest.raises(BadRequest):
            encode(["a"], env, port=80, secret="s", time_ns=0)
    for argv in ([], ["a\0b"], ["a"] * 1025):
        with pytest.raises(BadRequest):
            encode(argv, {}, port=80, secret="s", time_ns=0)


def session(metadata: Metadata, now: float = 0.0) -> str:
    status, body = metadata.answer("PUT", "/latest/api/token", TTL, now)
    assert status == 200
    return body.decode()


def test_the_assignment_is_given_once_to_who_has_the_token_and_a_session() -> None:
    metadata = Metadata("boot", lambda: b"work")
    token = session(metadata)
    fields = {"x-metadata-token": token}
    assert metadata.answer("GET", "/latest/aether/boot", {}, 1.0)[0] == 401
    assert metadata.answer("GET", "/latest/aether/boot", {"x-metadata-token": "other"}, 1.0)[0] == 401
    assert metadata.answer("GET", "/latest/aether/boot", fields, 61.0)[0] == 401
    assert metadata.answer("GET", "/latest/aether/another", fields, 1.0)[0] == 404
    assert metadata.answer("GET", "/latest/aether/", fields, 1.0)[0] == 404
    assert metadata.answer("POST", "/latest/aether/boot", fields, 1.0)[0] == 405
    assert not metadata.given
    assert metadata.answer("GET", "/latest/aether/boot", fields, 1.0) == (200, b"work")
    assert metadata.given
    assert metadata.answer("GET", "/latest/aether/boot", fields, 1.0)[0] == 404
    assert metadata.answer("GET", "/latest/aether/boot", {"x-metadata-token": session(metadata)}, 1.0)[0] == 404


@pytest.mark.parametrize("ttl", ["", "0", "-1", "21601", "1e3", "٣", "9" * 30])
def test_sessions_have_a_time_within_bounds(ttl: str) -> None:
    fields = {"x-metadata-token-ttl-seconds": ttl}
    assert Metadata("boot", bytes).answer("PUT", "/latest/api/token", fields, 0.0)[0] == 400


def test_sessions_are_not_opened_without_a_time_elsewhere_through_proxies_or_without_end() -> None:
    metadata = Metadata("boot", bytes)
    assert metadata.answer("PUT", "/latest/api/token", {}, 0.0)[0] == 400
    assert metadata.answer("PUT", "/latest/other", TTL, 0.0)[0] == 404
    assert metadata.answer("PUT", "/latest/api/token", {**TTL, "x-forwarded-for": "1.2.3.4"}, 0.0)[0] == 400
    statuses = [metadata.answer("PUT", "/latest/api/token", TTL, 0.0)[0] for _ in range(20)]
    assert statuses == [200] * 16 + [400] * 4
    assert metadata.answer("PUT", "/latest/api/token", TTL, 61.0)[0] == 200


def test_no_two_assignments_bring_the_same_randomness() -> None:
    found = [
        record
        for _ in range(2)
        for record in b64decode(encode(["x"], {}, port=80, secret="s", time_ns=7)).decode().split("\0")
        if record.startswith("r=")
    ]
    assert [len(bytes.fromhex(record[2:])) for record in found] == [64, 64]
    assert found[0] != found[1]


def test_a_machine_that_is_restored_is_told_nothing_on_its_command_line_and_owns_what_it_writes() -> None:
    command = restoring_command_line("qemu", "aether-x-i1", TCG, 128, 2, (5, 6, 7, 8), 9)
    assert not {"-kernel", "-append", "-initrd"} & set(command)
    assert "memory-backend-file,id=memory,size=128M,mem-path=/proc/self/fd/7,share=off" in command
    making = making_command_line("qemu", "aether-x-s", TCG, 128, 2, "words", (1, 2, 5, 6, 7, 8), 9)
    assert "memory-backend-file,id=memory,size=128M,mem-path=/proc/self/fd/7,share=on" in making
    alone = restoring_command_line("qemu", "aether-x-i1", TCG, 128, 2, (5, 6, 7, 8), 9, only_user=True)
    assert [word.replace("share=on", "share=off") for word in alone] == command
    assert alone != command
    # what was saved of devices fits those that it is loaded into
    places = [[word for word in line if "virtio-mmio-bus" in word] for line in (command, making)]
    assert places[0] == places[1]
    assert len(places[0]) == 3
    assert command[command.index("-cpu") + 1] == making[making.index("-cpu") + 1]


def test_a_monitor_is_given_descriptors_and_no_secret_but_the_boot_token() -> None:
    arguments = kernel_arguments(TCG, "t" * 64)
    command = command_line("qemu", "aether-x-i1", TCG, 128, 2, arguments, (5, 6, 7, 8), 9)
    assert command[:3] == ["qemu", "-name", "aether-x-i1"]
    assert command[command.index("-kernel") + 1] == "/proc/self/fd/5"
    assert {"fd=7,set=1", "fd=8,set=2"} <= set(command)
    assert "tap,id=net,fd=9" in command
    assert "mitigations=off" in arguments
    assert "mitigations" not in kernel_arguments(KVM, "t")
    assert "virtio-mmio-bus.0" not in " ".join(command)


def test_modules_say_what_they_need() -> None:
    assert depends(b"x\0license=GPL\0depends=virtio-ring,virtio\0name=y\0") == ["virtio_ring", "virtio"]
    assert depends(b"x\0depends=\0name=y\0") == []
    assert depends(b"none") == []


def test_the_first_archive_is_a_cpio_that_every_field_of_is_aligned(tmp_path_factory: pytest.TempPathFactory) -> None:
    module = tmp_path_factory.mktemp("modules") / "a.ko"
    module.write_bytes(b"12345")
    archive = initramfs(b"#!program", [module])
    names: list[str] = []
    at = 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        names.append(archive[at + 110 : at + 109 + fields[11]].decode())
        at += (110 + fields[11] + 3) // 4 * 4 + (fields[6] + 3) // 4 * 4
    assert names == [
        "dev", "proc", "sys", "system", "modules", "dev/console", "init", "modules/a.ko", "modules/list", "TRAILER!!!"
    ]  # fmt: skip
