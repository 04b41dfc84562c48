"""What is asked of a root file system before guests are given it."""

from __future__ import annotations

import struct

import pytest

from aether.functions.root_images import (
    FOLDERS,
    MAX_WORDS,
    Entry,
    check_entries,
    check_init,
    check_superblock,
    parse_listing,
)
from aether.model.errors import BadRequest

LISTING = """\
drwxr-xr-x 0/0                      82 2026-01-01 00:00 squashfs-root
drwxr-xr-x 0/0                       3 2026-01-01 00:00 squashfs-root/app
lrwxrwxrwx 0/0                       7 2026-01-01 00:00 squashfs-root/bin -> usr/bin
drwxr-xr-x 0/0                       3 2026-01-01 00:00 squashfs-root/dev
drwxr-xr-x 0/0                       3 2026-01-01 00:00 squashfs-root/proc
drwxrwxrwt 0/0                       3 2026-01-01 00:00 squashfs-root/tmp
drwxr-xr-x 0/0                      26 2026-01-01 00:00 squashfs-root/usr
crw-rw-rw- 0/0                  1,   3 2026-01-01 00:00 squashfs-root/usr/null
drwxr-xr-x 0/0                      26 2026-01-01 00:00 squashfs-root/usr/bin
lrwxrwxrwx 0/0                      19 2026-01-01 00:00 squashfs-root/usr/bin/run -> /opt/../usr/bin/a b
drwxr-xr-x 0/0                      19 2026-01-01 00:00 squashfs-root/opt
-rwxr-xr-x 0/0                   35664 2026-01-01 00:00 squashfs-root/usr/bin/a b
-rwxr-x--- 0/0                   35664 2026-01-01 00:00 squashfs-root/usr/bin/mine
lrwxrwxrwx 0/0                       4 2026-01-01 00:00 squashfs-root/loop -> loop
"""


def superblock(*, used: int = 4096, compression: int = 1, major: int = 4, magic: bytes = b"hsqs") -> bytes:
    return struct.pack("<4sIIIIHHHHHHQQ", magic, 9, 0, 131072, 1, compression, 17, 0, 1, major, 0, 0, used)


def test_a_whole_image_passes() -> None:
    for compression in (1, 3, 4, 5, 6):
        check_superblock(superblock(compression=compression), 4096)


@pytest.mark.parametrize(
    ("start", "size", "said"),
    [
        (b"", 0, "no squashfs image"),
        (b"\x7fELF" + bytes(200), 204, "no squashfs image"),
        (superblock()[:40], 4096, "no squashfs image"),
        (superblock(magic=b"sqsh"), 4096, "no squashfs image"),
        (superblock(major=3), 4096, "squashfs 3.0"),
        (superblock(compression=2), 4096, "gzip, lzo, xz, lz4, zstd"),
        (superblock(used=4097), 4096, "cut"),
        (superblock(used=4097), 4607, "cut"),
    ],
    ids=["empty", "elf", "short", "big-endian", "old", "lzma", "cut", "not-padded"],
)
def test_what_no_guest_can_read_is_refused(start: bytes, size: int, said: str) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        check_superblock(start, size)
    assert refused.value.details == {"field": "rootfs"}


def test_a_listing_is_read_with_links_devices_and_spaces() -> None:
    found = parse_listing(LISTING.splitlines(keepends=True))
    assert found["bin"] == Entry("lrwxrwxrwx", "usr/bin")
    assert found["usr/bin/a b"].mode == "-rwxr-xr-x"
    assert found["usr/null"].mode[0] == "c"
    assert len(found) == len(LISTING.splitlines()) - 1


@pytest.mark.parametrize("program", ["/bin/run", "/usr/bin/run", "/usr/bin/a b"])
def test_a_program_is_found_through_links(program: str) -> None:
    check_entries(parse_listing(LISTING.splitlines()), [program])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/bin/none", "the program /bin/none"),
        ("/loop/x", "the program /loop/x"),
        ("/usr/bin/mine", "the right of everybody to execute /usr/bin/mine"),
        ("/usr/bin", "the right of everybody to execute /usr/bin"),
    ],
    ids=["none", "loop", "private", "folder"],
)
def test_a_program_that_cannot_be_run_is_named(program: str, said: str) -> None:
    with pytest.raises(BadRequest, match=f"the image lacks {said}"):
        check_entries(parse_listing(LISTING.splitlines()), [program])


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(BadRequest) as refused:
        check_entries({"app": Entry("lrwxrwxrwx", "tmp"), "tmp": Entry("drwxr-xr-x")}, ["/run"])
    assert refused.value.message == (
        "the image lacks the folder /app, the folder /dev, the folder /proc, the program /run"
    )
    assert set(FOLDERS) == {"app", "dev", "proc", "tmp"}


@pytest.mark.parametrize(
    "init",
    [
        [], [""], ["node"], ["usr/bin/node"], ["/usr/../bin/node"], ["/usr//node"], ["/"], ["/a\nb"], ["/a", ""],
        ["/a", "\0"], ["/a"] * (MAX_WORDS + 1), ["/a", "x" * 5000],
    ],
    ids=["none", "empty", "name", "relative", "up", "double", "root", "line", "word", "nul", "many", "long"],
)  # fmt: skip
def test_commands_that_nothing_could_run_are_refused(init: list[str]) -> None:
    with pytest.raises(BadRequest) as refused:
        check_init(init)
    assert refused.value.details == {"field": "init"}


def test_a_command_is_kept_word_by_word() -> None:
    assert check_init(["/usr/bin/node", "--require=/a b.js", "é"]) == ("/usr/bin/node", "--require=/a b.js", "é")
