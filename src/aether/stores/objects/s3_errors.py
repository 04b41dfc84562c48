"""What an S3 store, the way to it and its credentials can say, in Aether's errors: no error of botocore's gets past.

`told` is for requests under way: the caller can try again later. `explained` is for the start: it says what an
operator has to change.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
from collections.abc import Generator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    InvalidRegionError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from aether.model.errors import AetherError, BadRequest, ConfigError, NotFound, ServiceUnavailable

FAILURES = (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError, OSError)
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
    ProfileNotFound,
)
_MISSING = {"NoSuchKey", "404", "NotFound"}
_REFUSED = {
    "BadDigest",
    "EntityTooLarge",
    "EntityTooSmall",
    "IncompleteBody",
    "InvalidArgument",
    "InvalidPart",
    "InvalidPartOrder",
    "MalformedXML",
}
_TELLS_SKEW = {"RequestTimeTooSkewed", "RequestExpired"}
_NO_KEY = {"InvalidAccessKeyId", "XAdminUserNotFound"}
_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"


class Failed(ServiceUnavailable):
    """The store answered, and says that it failed."""


class Changed(ServiceUnavailable):
    """The source of a copy was replaced while it was copied."""


@contextlib.contextmanager
def told() -> Generator[None]:
    """Raises NotFound, BadRequest or ServiceUnavailable for what fails inside."""
    try:
        yield
    except FAILURES as error:
        raise translated(error) from error


def translated(error: Exception) -> AetherError:
    if not isinstance(error, ClientError):
        return ServiceUnavailable(f"the object store does not answer ({type(error).__name__}); try again")
    return from_code(code_of(error), status_of(error))


def from_code(code: str, status: int) -> AetherError:
    if code in _MISSING:
        return NotFound("the object does not exist")
    if code == "NoSuchUpload":
        return NotFound("the upload in parts is over, or was never begun")
    if code in _REFUSED:
        return BadRequest(f"the object store refused it: {code}")
    if code in ("PreconditionFailed", "412"):
        return Changed("the object was replaced while it was copied; try again")
    kind = Failed if status >= 500 else ServiceUnavailable
    return kind(f"the object store cannot serve: {code or status}")


def explained(error: Exception, bucket: str, where: str) -> AetherError:
    """ConfigError where a person must change something, ServiceUnavailable where waiting may help."""
    if isinstance(error, _NO_CREDENTIALS):
        return ConfigError(f"there are no credentials for the object store: {_KEYS} ({error})")
    if isinstance(error, (NoRegionError, InvalidRegionError)):
        return ConfigError("the object store needs a region: set AWS_REGION")
    if not isinstance(error, ClientError):
        return ServiceUnavailable(
            f"the object store at {where} cannot be reached ({type(error).__name__}): is it running, and is "
            "AETHER_S3_ENDPOINT_URL right?"
        )
    code, status = code_of(error), status_of(error)
    if code in ("NoSuchBucket", "404", "NotFound"):
        return ConfigError(
            f"there is no bucket '{bucket}' at {where}: make it, or set AETHER_ARTIFACT_BUCKET to one that is there"
        )
    if code in _TELLS_SKEW:
        return ConfigError(f"the object store refuses this machine's clock, which is {_skew(error)}: set it by NTP")
    if code in _NO_KEY:
        return ConfigError(f"the object store at {where} does not know this access key: check AWS_ACCESS_KEY_ID")
    if code == "SignatureDoesNotMatch":
        return ConfigError("the object store refuses the signature: check AWS_SECRET_ACCESS_KEY and AWS_REGION")
    if code in ("ExpiredToken", "InvalidToken", "ExpiredTokenException", "TokenRefreshRequired"):
        return ConfigError("the session token for the object store has expired: get new credentials")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"):
        region = _headers(error).get("x-amz-bucket-region", "the bucket's own region")
        return ConfigError(f"the bucket '{bucket}' is in another region: set AWS_REGION to {region}")
    if code == "InvalidBucketName":
        return ConfigError(f"'{bucket}' cannot be the name of a bucket: set AETHER_ARTIFACT_BUCKET")
    if code.startswith("KMS."):
        return ConfigError(f"the object store cannot use the KMS key ({code}): check AETHER_S3_SSE_KMS_KEY")
    if status in (401, 403):
        return ConfigError(
            f"these credentials may not use the bucket '{bucket}' ({code}): docs/object-stores.md has the policy "
            "that they need"
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return ServiceUnavailable(f"the object store at {where} cannot serve: {code or status}")
    return ConfigError(f"what answers at {where} does not do what Aether needs of S3: {code or status}")


def code_of(error: ClientError) -> str:
    details: Any = error.response.get("Error", {})
    return str(details.get("Code", ""))


def status_of(error: ClientError) -> int:
    answer: Any = error.response.get("ResponseMetadata", {})
    return int(answer.get("HTTPStatusCode", 0))


def _headers(error: ClientError) -> dict[str, str]:
    answer: Any = error.response.get("ResponseMetadata", {})
    return dict(answer.get("HTTPHeaders", {}))


def _skew(error: ClientError) -> str:
    try:
        there = parsedate_to_datetime(_headers(error).get("date", ""))
    except ValueError:
        return "too far from its own"
    secs = round((datetime.now(UTC) - there).total_seconds())
    return f"{abs(secs)} s {'ahead of' if secs > 0 else 'behind'} its own"
