"""What a server keeps of functions, whether or not it runs them: their catalogue, their code, their invocations."""

from __future__ import annotations

from collections.abc import Sequence

from aether.apps.vault import Vault
from aether.functions.catalogue import Catalogue
from aether.functions.code import CodeStore
from aether.functions.contents import Contents
from aether.functions.invocations import Invocations
from aether.functions.retention import CodeSweeper, InvocationSweeper, VersionSweeper
from aether.functions.runtimes import MAX_IMAGE_BYTES, PREFIX, Runtimes, RuntimeSweeper
from aether.functions.services import FunctionServices
from aether.leases import Leases
from aether.model.database import DatabasePort
from aether.registry.policy import ReleasePolicy
from aether.retention.service import Chore
from aether.settings import Settings
from aether.topology.objects import OpenObjects


async def open_functions(
    settings: Settings, database: DatabasePort, vault: Vault, objects: OpenObjects, leases: Leases, *, sweep: bool
) -> FunctionServices:
    """The caller closes `catalogue` and then `codes` and `runtimes.images`, and says with `run_by` who runs them.
    `sweep`: no other server is at work in the data directory. Raises OSError."""
    codes = CodeStore(settings.data_dir / "functions" / "code", objects)
    await codes.open(sweep=sweep)
    catalogue = Catalogue(database, vault, codes, ReleasePolicy.of(settings), leases)
    images = Contents(
        settings.data_dir / "functions" / "runtimes", objects,
        prefix=PREFIX, what="root file system", max_bytes=MAX_IMAGE_BYTES,
    )  # fmt: skip
    await images.open(sweep=sweep)
    runtimes = Runtimes(database, images, catalogue.locks)
    return FunctionServices(catalogue, codes, Invocations(database), runtimes)


def function_chores(settings: Settings, database: DatabasePort, functions: FunctionServices) -> Sequence[Chore]:
    """What is taken away in time."""
    grace = settings.retention_grace_secs
    return (
        VersionSweeper(database),
        CodeSweeper(database, functions.codes, functions.catalogue.locks, grace),
        RuntimeSweeper(database, functions.runtimes.images, functions.catalogue.locks, grace),
        InvocationSweeper(functions.invocations, settings.function_invocation_ttl_secs),
    )
