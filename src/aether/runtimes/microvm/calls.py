"""Takes calls on a listening socket and owns the tasks that answer them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

MAX_CALLS = 8
"""Connections of one guest at a time; more wait in the kernel, where they cost the server nothing."""

_RETRY_SECS = 0.2

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def take_calls(listener: socket.socket, answer: Answer, limit: int) -> None:
    """Run `answer` for every connection to `listener`, each in a task, until cancelled; then all of them end.

    `limit` is how many bytes a reader holds. What goes wrong with a connection ends that connection only. `answer`
    must end by itself, or its caller keeps others out.
    """
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(MAX_CALLS)
    async with asyncio.TaskGroup() as tasks:
        while True:
            await room.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # out of descriptors: the guest waits, its machine does not end for it
                room.release()
                await asyncio.sleep(_RETRY_SECS)
                continue
            task = tasks.create_task(_take(connection, answer, limit))
            task.add_done_callback(lambda _: room.release())


async def _take(connection: socket.socket, answer: Answer, limit: int) -> None:
    try:
        reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    except OSError:
        connection.close()
        return
    try:
        await answer(reader, writer)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # a guest that hangs up, dawdles or floods has itself to blame: it gets no answer
    finally:
        writer.close()
