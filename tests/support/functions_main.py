"""A process of its own that starts an instance of a function, for tests that kill it: `functions_main.py KIND DATA
ARCHIVE ID`.

Says `ready` once the function listens and its log says `up`, and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
from hashlib import sha256
from pathlib import Path

from aether.model.function_instance import Code, CodeForm

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest does that for tests


async def main(kind: str, data: Path, archive: Path, instance_id: str) -> None:
    from support.function_runtimes import KINDS
    from support.microvm import spec

    runtime = KINDS[kind].make(data)
    code = Code(archive, CodeForm.TAR_GZ, sha256(archive.read_bytes()).hexdigest())
    await runtime.start(spec(code, instance_id))
    while "up" not in [item.text for item in await runtime.log(instance_id)]:
        await asyncio.sleep(0.02)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runtime.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
