"""Keys and database brought together at a start: what is sealed can be opened, and nothing is left in clear."""

from __future__ import annotations

import asyncio

from aether.apps import sealing
from aether.apps.vault import Vault
from aether.model.errors import AetherError
from aether.observability.logging import logger
from aether.settings import Settings
from aether.stores.database.engine import Database
from aether.stores.keys import keyring

_RETRY_SECS = 60.0
_log = logger(__name__)


async def unlock(settings: Settings, database: Database) -> Vault:
    """The vault of an open database. Raises ConfigError when a key that sealed something is missing: nothing is
    started then, because an app without its variables is worse than none. Raises OSError of the key file."""
    in_use = await sealing.keys_in_use(database)
    keys = keyring.load(settings.data_dir, given=settings.secrets_key, file=settings.secrets_key_file, in_use=in_use)
    vault = Vault(keys)
    await sealing.adopt(database, vault)
    await database.scrub()
    return vault


async def seal_anew(database: Database, vault: Vault) -> None:
    """In the background of a start: bring what older keys sealed under the newest one, until that has worked."""
    while True:
        try:
            if await sealing.keys_in_use(database) != {vault.sealer.newest}:
                await sealing.reseal(database, vault)
            return
        except AetherError as error:
            _log.warning("what older keys sealed cannot be sealed anew yet", reason=error.message)
            await asyncio.sleep(_RETRY_SECS)
