"""Segments of a tar stream on their way to disk: reused buffers, threads that hash and compress, writing in order.

One thread hashes the tar, some compress, one hashes and writes the compressed members in their order, one has the
disk write along so that the flush at the end is short. The caller of `submit` is held back when every buffer is in
flight, which bounds memory. What a segment holds is `pack`'s business.
"""

import os
import struct
from hashlib import sha256
from io import FileIO
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType

from aether.artifact.codec import checksum, deflater
from aether.model.errors import LocalIOError

CAPACITY = 1 << 20
"""Bytes of one segment at most."""

_FLUSH_EVERY = 24 << 20

_ROOM = CAPACITY + 4096
_MEMBER_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
"""RFC 1952: deflate, no flags, no time, no extra flags, unknown system."""


class _Segment:
    __slots__ = ("buffer", "lock", "member", "size", "users")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.size = 0
        self.users = 2
        self.lock = Lock()
        self.member: SimpleQueue[list[bytes]] = SimpleQueue()


class Pipeline:
    """A context: fill `buffer()`, call `submit(size)` for the next one, `finish()` at the end, then read the digests.

    Leaving the context ends every thread, whether or not `finish` was reached. Errors of the threads are raised by
    `submit`, `finish` and `flush`: LocalIOError when the disk is full.
    """

    def __init__(self, out: FileIO, level: int) -> None:
        workers = max(2, min(8, os.cpu_count() or 2))
        self._out = out
        self._compress = deflater(level)
        self._checksum = checksum()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(2 * workers + 4):
            self._free.put(memoryview(bytearray(_ROOM)))
        self._to_hash: SimpleQueue[_Segment | None] = SimpleQueue()
        self._to_compress: SimpleQueue[_Segment | None] = SimpleQueue()
        self._to_write: SimpleQueue[_Segment | None] = SimpleQueue()
        self._to_flush: SimpleQueue[bool] = SimpleQueue()
        self._error: BaseException | None = None
        self._ended = False
        self._current = _Segment(self._free.get())
        self.digest = self.content_digest = ""
        self.size_bytes = self.tar_bytes = 0
        self._compressors = [Thread(target=self._run_compress, name="aether-deflate") for _ in range(workers)]
        self._threads = [
            Thread(target=self._run_hash, name="aether-hash"),
            Thread(target=self._run_write, name="aether-write"),
            *self._compressors,
        ]
        self._flusher = Thread(target=self._run_flush, name="aether-flush")

    def __enter__(self) -> "Pipeline":
        for thread in (*self._threads, self._flusher):
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._flusher.join()

    def buffer(self) -> memoryview:
        """The buffer to fill; CAPACITY bytes may be submitted, a little more may be overwritten."""
        return self._current.buffer

    def submit(self, size: int) -> memoryview:
        """Hand over the first `size` bytes of the current buffer; returns the next one."""
        segment = self._current
        segment.size = size
        self.tar_bytes += size
        self._to_write.put(segment)
        self._to_hash.put(segment)
        self._to_compress.put(segment)
        self._current = _Segment(self._free.get())
        self._check()
        return self._current.buffer

    def finish(self, size: int = 0) -> None:
        """Submit the last `size` bytes and wait until all is written; the digests are set afterwards.

        The disk may still be at it: `flush` waits for that.
        """
        if size:
            self.submit(size)
        self._end()
        self._check()

    def flush(self) -> None:
        """After `finish`: wait until everything is on disk."""
        self._flusher.join()
        self._check()

    def _check(self) -> None:
        if isinstance(self._error, OSError):
            raise LocalIOError(f"cannot write the artifact: {self._error.strerror}") from self._error
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._to_hash.put(None)
        for _ in self._compressors:
            self._to_compress.put(None)
        self._to_write.put(None)
        for thread in self._threads:
            thread.join()
        self._to_flush.put(False)

    def _release(self, segment: _Segment) -> None:
        with segment.lock:
            segment.users -= 1
            last = not segment.users
        if last:
            self._free.put(segment.buffer)

    def _run_hash(self) -> None:
        hashed = sha256()
        while (segment := self._to_hash.get()) is not None:
            hashed.update(segment.buffer[: segment.size])
            self._release(segment)
        self.content_digest = hashed.hexdigest()

    def _run_compress(self) -> None:
        while (segment := self._to_compress.get()) is not None:
            member: list[bytes] = []
            try:
                if self._error is None:
                    data = segment.buffer[: segment.size]
                    tail = struct.pack("<II", self._checksum(data), segment.size)
                    member = [_MEMBER_HEAD, self._compress(data), tail]
            except BaseException as error:  # noqa: BLE001 (kept for the thread that packs, which raises it)
                self._error = error
            finally:
                self._release(segment)
                segment.member.put(member)

    def _run_write(self) -> None:
        hashed = sha256()
        flushed = 0
        while (segment := self._to_write.get()) is not None:
            member = segment.member.get()
            if self._error is not None:
                continue
            try:
                for data in member:
                    hashed.update(data)
                self.size_bytes += _write_all(self._out.fileno(), member)
                if self.size_bytes - flushed > _FLUSH_EVERY:
                    flushed = self.size_bytes
                    self._to_flush.put(True)
            except BaseException as error:  # noqa: BLE001 (kept for the thread that packs, which raises it)
                self._error = error
        self.digest = hashed.hexdigest()

    def _run_flush(self) -> None:
        more = True
        while more:
            more = self._to_flush.get()
            while more and not self._to_flush.empty():
                more = self._to_flush.get()
            try:
                if self._error is None:
                    os.fsync(self._out.fileno())
            except BaseException as error:  # noqa: BLE001 (kept for the thread that packs, which raises it)
                self._error = error


def _write_all(fd: int, member: list[bytes]) -> int:
    """Write all parts in one call where the system takes them so; returns their length."""
    size = sum(map(len, member))
    written = os.writev(fd, member) if member else 0
    if written < size:
        rest = memoryview(b"".join(member))[written:]
        while rest:
            rest = rest[os.write(fd, rest) :]
    return size
