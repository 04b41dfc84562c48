"""Logins of devices: begun without a token, approved by somebody who has one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Response, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody

from aether.api import auditing
from aether.api.routers.auth import SessionView, session_view
from aether.api.services import Caller, Deps
from aether.identity.devices import DeviceLogin, shown_code
from aether.model.times import to_iso

MAX_WAIT_SECS = 25.0
Code = FromPath[str]


class NewDevice(msgspec.Struct, forbid_unknown_fields=True):
    """`client` says to whoever approves what asks, such as the machine's name."""

    client: Annotated[str, msgspec.Meta(max_length=100)] = ""


class DeviceView(msgspec.Struct):
    """A device that waits; `status` is pending, approved, denied or used."""

    user_code: str
    client: str
    address: str
    created_at: str
    expires_at: str
    status: str


class BegunDevice(DeviceView):
    """`device_code` is the device's own secret, shown this once."""

    device_code: str = ""


class Redeem(msgspec.Struct, forbid_unknown_fields=True):
    """Waits for up to `wait_secs` (25 at most) until somebody has decided."""

    device_code: Annotated[str, msgspec.Meta(max_length=100)]
    wait_secs: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_SECS)] = 0.0


class Waiting(msgspec.Struct):
    """Nobody has decided yet."""

    status: str = "pending"


class Decision(msgspec.Struct, forbid_unknown_fields=True):
    approve: bool


@post("/auth/device", tags=["auth"])
async def begin_device(data: JSONBody[NewDevice], services: Deps) -> BegunDevice:
    """Begin the login of a device: it shows `user_code` and waits with `device_code`."""
    identity, note = services.identity, auditing.note()
    identity.throttle.begin(None, note.address)
    secret, made = await identity.devices.begin(data.client, note.address)
    shown = _view(made)
    return BegunDevice(
        shown.user_code, shown.client, shown.address, shown.created_at, shown.expires_at, shown.status, secret
    )


@post(
    "/auth/device/token",
    status_code=200,
    tags=["auth"],
    responses={202: ResponseSpec(Waiting, generate_examples=False, description="Nobody has decided yet.")},
)
async def redeem_device(data: JSONBody[Redeem], services: Deps) -> SessionView | Response[Waiting]:
    """The device's session once it was let in; 202 while nobody has decided, 403 when it was turned away, 404 when
    the code has expired."""
    note = auditing.note()
    pair = await services.identity.devices.redeem(data.device_code, data.wait_secs)
    if pair is None:
        return Response(Waiting(), status_code=202)
    note.actor, note.actor_kind, note.target = pair.name, "session", pair.session_id
    return session_view(pair)


@get("/auth/device/{user_code:str}", tags=["auth"])
async def show_device(user_code: Code, services: Deps) -> DeviceView:
    """What waits with this code: look before letting it in."""
    return _view(await services.identity.devices.find(user_code))


@post("/auth/device/{user_code:str}", status_code=200, tags=["auth"])
async def decide_device(user_code: Code, data: JSONBody[Decision], services: Deps, caller: Caller) -> DeviceView:
    """Let the device in with the caller's own rights, or turn it away."""
    found = await services.identity.devices.decide(user_code, caller, approve=data.approve)
    auditing.about(f"{'let in' if data.approve else 'turned away'}: {found.client} at {found.address}")
    return _view(found)


def _view(login: DeviceLogin) -> DeviceView:
    return DeviceView(
        shown_code(login.user_code), login.client, login.address, to_iso(login.created_at),
        to_iso(login.expires_at), login.status,
    )  # fmt: skip


HANDLERS = [begin_device, redeem_device, show_device, decide_device]
