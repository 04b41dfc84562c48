"""The pure parts of runs and volumes: WebSocket frames, command lines, what volumes may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli.arguments import Parser
from aether.cli.run import command_line, configure
from aether.client.websocket import BINARY, TEXT, Frames, frame
from aether.model.errors import BadRequest, NetworkError, UsageError
from aether.model.instance import Volume
from aether.model.volumes import check_volumes, from_json, to_json


def unmasked(data: bytes) -> bytes:
    """The same frames as a server sends them."""
    out, at = bytearray(), 0
    while at < len(data):
        size, head = data[at + 1] & 0x7F, 2
        if size == 126:
            size, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
        elif size == 127:
            size, head = int.from_bytes(data[at + 2 : at + 10], "big"), 10
        out += bytes((data[at], data[at + 1] & 0x7F)) + data[at + 2 : at + head]
        key = data[at + head : at + head + 4]
        body = data[at + head + 4 : at + head + 4 + size]
        out += bytes(byte ^ key[i % 4] for i, byte in enumerate(body))
        at += head + 4 + size
    return bytes(out)


@given(
    st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), st.binary(max_size=300)), max_size=5),
    st.integers(1, 50),
)
def test_messages_survive_any_cut(messages: list[tuple[int, bytes]], step: int) -> None:
    data = unmasked(b"".join(frame(kind, text) for kind, text in messages))
    frames, found = Frames(), list[tuple[int, bytes]]()
    for at in range(0, len(data), step):
        found += frames.feed(data[at : at + step])
    assert found == messages


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536, 200_000])
def test_every_length_has_its_form(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    assert list(Frames().feed(unmasked(frame(BINARY, payload[:size])))) == [(BINARY, payload[:size])]


@pytest.mark.parametrize("data", [b"\xf2\x00", b"\x82\x81....x", b"\x80\x01x", b"\x82\x7f" + b"\xff" * 8])
def test_what_no_server_sends_is_refused(data: bytes) -> None:
    with pytest.raises(NetworkError):
        list(Frames().feed(data))


def test_a_message_in_pieces_is_one() -> None:
    assert list(Frames().feed(b"\x02\x01a\x89\x00\x00\x01b\x80\x01c")) == [(9, b""), (BINARY, b"abc")]


@pytest.mark.parametrize(
    ("words", "app", "command"),
    [
        (["ls", "-la", "--app", "x"], None, ["ls", "-la", "--app", "x"]),
        (["--app", "a", "ls", "--list"], "a", ["ls", "--list"]),
        (["--app=a", "--detach", "--", "--list"], "a", ["--list"]),
        (["--env", "A=b", "sh", "-c", "x"], None, ["sh", "-c", "x"]),
    ],
)
def test_flags_end_where_the_command_begins(words: list[str], app: str | None, command: list[str]) -> None:
    parser = Parser(prog="aether run")
    configure(parser)
    found = parser.read(words)
    assert (found.app, found.command) == (app, command)


def test_an_unknown_flag_before_the_command_is_refused() -> None:
    parser = Parser(prog="aether run")
    configure(parser)
    with pytest.raises(UsageError, match="--nope"):
        parser.read(["--nope", "ls"])


def test_one_word_is_a_shells_and_several_stay_what_they_are() -> None:
    assert command_line(["echo $HOME | wc"]) == "echo $HOME | wc"
    assert command_line(["echo", "$HOME", "a b"]) == "echo '$HOME' 'a b'"


@pytest.mark.parametrize("path", ["/data", "/srv/x", "/app/uploads", "/var/lib/shop", "/mnt/ü"])
def test_paths_of_volumes(path: str) -> None:
    check_volumes([Volume("data", path)])
    assert from_json(to_json([Volume("data", path)])) == (Volume("data", path),)


@pytest.mark.parametrize(
    "path",
    ["", "/", "data", "/data/", "//data", "/a/../b", "/a/./b", "/a\nb", "/app", "/app/.aether/x", "/" + "x" * 200]
    + [f"/{name}/x" for name in ("bin", "dev", "etc", "lib64", "proc", "root", "run", "sys", "tmp", "usr")],
)
def test_paths_that_no_volume_has(path: str) -> None:
    with pytest.raises(BadRequest, match="volume data"):
        check_volumes([Volume("data", path)])


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "..", "a" * 41])
def test_names_that_no_volume_has(name: str) -> None:
    with pytest.raises(BadRequest, match="cannot name a volume"):
        check_volumes([Volume(name, "/data")])


def test_volumes_are_apart() -> None:
    check_volumes([Volume("a", "/data"), Volume("b", "/data2")])
    for volumes in (
        [Volume("a", "/data"), Volume("a", "/other")],
        [Volume("a", "/data"), Volume("b", "/data")],
        [Volume("a", "/data"), Volume("b", "/data-2"), Volume("c", "/data/in")],
        [Volume(f"v{n}", f"/v{n}") for n in range(9)],
    ):
        with pytest.raises(BadRequest):
            check_volumes(volumes)
