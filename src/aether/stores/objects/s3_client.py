"""Clients of one bucket: pooled connections, bounded retries, credentials from AWS's standard chain.

Two of them call: `calling` repeats a request that failed by itself, `once` leaves that to whoever knows whether it
may be repeated. `signing` never connects.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, cast

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

MIB = 1024**2
_NO_REGION = "us-east-1"
"""What stores that know no regions expect."""


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the bucket is and how to deal with it. Empty: AWS, no other address for clients, the bucket's own
    encryption."""

    bucket: str
    endpoint_url: str = ""
    public_url: str = ""
    """Where clients reach the endpoint, when that is another address than the server's."""
    sse: str = ""
    sse_kms_key: str = ""
    connect_timeout_secs: float = 3.0
    read_timeout_secs: float = 20.0
    copy_timeout_secs: float = 120.0
    attempts: int = 3
    connections: int = 64
    copy_part_bytes: int = 128 * MIB
    """What is larger is copied in parts of so many bytes."""
    put_part_bytes: int = 8 * MIB
    """Of what the server writes without knowing its size."""

    @property
    def where(self) -> str:
        return self.endpoint_url or "AWS"

    def encryption(self) -> dict[str, str]:
        """Parameters of requests that write an object."""
        wanted = {"ServerSideEncryption": self.sse, "SSEKMSKeyId": self.sse_kms_key}
        return {name: value for name, value in wanted.items() if value}

    def encryption_headers(self) -> dict[str, str]:
        """What a signed request must carry of `encryption`."""
        wanted = {
            "x-amz-server-side-encryption": self.sse,
            "x-amz-server-side-encryption-aws-kms-key-id": self.sse_kms_key,
        }
        return {name: value for name, value in wanted.items() if value}


class Clients:
    """Open until `close`."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self.calling: Any = None
        self.once: Any = None
        self.signing: Any = None
        self.ca_bundle: str | None = None

    async def open(self, options: S3Options) -> None:
        """Connects to nothing yet. Raises BotoCoreError for a profile or a region that cannot be."""
        session = cast("Any", get_session())
        region = session.get_config_variable("region") or (_NO_REGION if options.endpoint_url else None)
        self.ca_bundle = session.get_config_variable("ca_bundle")

        async def client(endpoint: str, attempts: int, read_timeout: float) -> Any:
            config = cast("Any", AioConfig)(
                signature_version="s3v4",
                connect_timeout=options.connect_timeout_secs,
                read_timeout=read_timeout,
                max_pool_connections=options.connections,
                retries={"mode": "standard", "total_max_attempts": attempts},
                s3={"addressing_style": "path" if endpoint else "auto"},
                # what botocore adds by itself breaks on stores that do not know it
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            made = session.create_client("s3", region_name=region, endpoint_url=endpoint or None, config=config)
            return await self._stack.enter_async_context(made)

        endpoint = options.endpoint_url
        self.calling = await client(endpoint, options.attempts, options.read_timeout_secs)
        self.once = await client(endpoint, 1, options.copy_timeout_secs)
        self.signing = await client(options.public_url, 1, 1.0) if options.public_url else self.once

    async def close(self) -> None:
        await self._stack.aclose()
