"""Whose apps and functions a caller may touch: one rule, as a check of one and as a condition for lists.

A token that is bound to apps may touch the functions that are called as they are. What is somebody else's is told
exactly as what does not exist, so that names, digests and ids tell nothing.
"""

from __future__ import annotations

import sqlalchemy as sa

from aether.identity.roles import Principal
from aether.model.database import DatabasePort
from aether.model.errors import NotFound
from aether.model.function import is_function_id
from aether.stores.database.tables import applications, deployments, functions


def visible(caller: Principal) -> sa.ColumnElement[bool]:
    """The condition on `applications` that `Principal.may_touch` is on one app."""
    return _touchable(applications, caller)


def visible_functions(caller: Principal) -> sa.ColumnElement[bool]:
    """The same on `functions`."""
    return _touchable(functions, caller)


def _touchable(table: sa.Table, caller: Principal) -> sa.ColumnElement[bool]:
    conditions: list[sa.ColumnElement[bool]] = []
    if caller.apps is not None:
        conditions.append(table.c.name.in_(sorted(caller.apps)))
    if not caller.role_sees_all:
        conditions.append(table.c.owner.in_(sorted(caller.owners)))
    return sa.and_(sa.true(), *conditions)


class Ownership:
    """Checks before a route does its work."""

    def __init__(self, database: DatabasePort) -> None:
        self._database = database

    async def check_app(self, caller: Principal, name: str) -> None:
        """Raises NotFound for an app of others; one that does not exist is left to whoever looks for it."""
        if caller.sees_everything:
            return
        async with self._database.read(brief=True) as tx:
            owner = await tx.scalar(sa.select(applications.c.owner).where(applications.c.name == name))
        if owner is None or not caller.may_touch(name, owner):
            raise NotFound(f"there is no app '{name}'")

    async def check_function(self, caller: Principal, ref: str) -> None:
        """`ref` is an id or a name. Raises NotFound for a function of others; one that does not exist is left to
        whoever looks for it."""
        if caller.sees_everything:
            return
        called = functions.c.id if is_function_id(ref) else functions.c.name
        async with self._database.read(brief=True) as tx:
            query = sa.select(functions.c.name, functions.c.owner).where(called == ref)
            row = (await tx.execute(query)).one_or_none()
        if row is None or not caller.may_touch(row.name, row.owner):
            raise NotFound(f"there is no function '{ref}'")

    async def check_deployment(self, caller: Principal, deployment_id: str) -> None:
        """Raises NotFound for a deployment of an app of others."""
        if caller.sees_everything:
            return
        query = sa.select(applications.c.name, applications.c.owner)
        query = query.join(deployments, deployments.c.app_id == applications.c.id)
        async with self._database.read(brief=True) as tx:
            row = (await tx.execute(query.where(deployments.c.id == deployment_id))).one_or_none()
        if row is None or not caller.may_touch(row.name, row.owner):
            raise NotFound(f"there is no deployment '{deployment_id}'")
