"""Which object store serves artifacts: a directory of the data folder, or an S3 bucket."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aether.api.transfers import ObjectTransfer
from aether.apps.ports import ArtifactObjects
from aether.model.errors import AetherError
from aether.registry.ports import ObjectStore
from aether.settings import Settings
from aether.stores.objects.filesystem import FilesystemObjects
from aether.stores.objects.signing import UrlSigner, load_key

if TYPE_CHECKING:
    from aether.stores.objects.s3_client import S3Options

LOOK_SECS = 15.0


class OpenObjects(ObjectStore, ArtifactObjects, Protocol):
    """A store for everybody who needs one."""

    async def check(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Store:
    """`transfer` receives and sends at /objects/ what has no HTTP server of its own; None where clients go to S3."""

    objects: OpenObjects
    transfer: ObjectTransfer | None


async def open_objects(settings: Settings) -> Store:
    """The caller closes `objects`. Raises OSError and ValueError of the data folder; ConfigError, which says what to
    do, when the bucket cannot be used. A bucket that cannot be reached yet is no error: artifacts wait for it."""
    if settings.storage_mode == "s3":
        from aether.stores.objects.s3 import S3Objects

        bucket = S3Objects(_options(settings))
        await bucket.open()
        return Store(bucket, None)
    signer = UrlSigner(load_key(settings.data_dir / "signing.key"))
    folder = FilesystemObjects(settings.data_dir / "objects", signer, base_url=settings.s3_base_url)
    await folder.open()
    return Store(folder, folder)


def look(settings: Settings) -> tuple[str, str]:
    """What the doctor finds: (ok, warn or fail; what was found, and what to do). Blocks for some seconds at most."""
    if settings.storage_mode != "s3":
        return "ok", f"directory {settings.data_dir / 'objects'}"
    options = _options(settings)
    try:
        able = asyncio.run(_look(settings))
    except (AetherError, TimeoutError) as error:
        return "fail", str(error) or f"the object store at {options.where} does not answer within {LOOK_SECS:g} s"
    return "ok", f"bucket {options.bucket} at {options.where} ({able})"


async def _look(settings: Settings) -> str:
    from aether.stores.objects.s3 import S3Objects

    bucket = S3Objects(_options(settings))
    try:
        async with asyncio.timeout(LOOK_SECS):
            await bucket.open()
            return (await bucket.abilities()).told()
    finally:
        await bucket.close()


def _options(settings: Settings) -> S3Options:
    from aether.stores.objects.s3_client import S3Options

    return S3Options(
        bucket=settings.artifact_bucket,
        endpoint_url=settings.s3_endpoint_url.rstrip("/"),
        public_url=settings.s3_base_url.rstrip("/"),
        sse=settings.s3_sse,
        sse_kms_key=settings.s3_sse_kms_key,
    )
