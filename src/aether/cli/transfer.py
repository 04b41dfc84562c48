"""Bringing a packed artifact into the registry, with its progress on the terminal."""

from __future__ import annotations

from aether.client.transfer import Announced, Watch, transfer, unsure
from aether.model.errors import AetherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from aether.build.project import Made
    from aether.cli.context import Context
    from aether.cli.progress import Progress
    from aether.client.transfer import Sent

AGAIN = "what has arrived is kept for a while: deploy again to go on from there"


def bring(context: Context, progress: Progress, made: Made, *, signature: str | None = None) -> Sent:
    """Have the registry store the artifact. An interrupt leaves nothing there but what the registry takes away by
    itself."""
    packed, project = made.packed, made.plan.project
    artifact = Announced(
        project.app,
        packed.digest,
        packed.size_bytes,
        content_digest=packed.content_digest,
        runtime=project.runtime,
        signature=signature,
    )
    watch = _Shown(context, progress)
    try:
        return transfer(context.api, artifact, str(packed.artifact), watch)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"interrupted during the upload: nothing was deployed; {AGAIN}") from None
    except AetherError as error:
        if unsure(error):
            error.message += f" (nothing was deployed; {AGAIN})"
        raise


class _Shown(Watch):
    def __init__(self, context: Context, progress: Progress) -> None:
        self._context = context
        self._progress = progress

    def advance(self, done: int, total: int) -> None:
        self._progress.advance(done, total)

    def resumed(self, arrived: int, count: int) -> None:
        self._progress.note(f"upload: {arrived} of {count} parts had arrived before")

    def trouble(self, error: AetherError) -> None:
        self._context.log.debug("sending again", error=error.message)
        self._progress.step(f"{error.message}; trying again")
