"""A cron schedule: which moments it names. Pure; moments are microseconds since the epoch.

Five fields in the words of cron(5), in a time zone. A fixed time of day that a change of the clocks skips comes at
the end of the gap, one that the change repeats comes once; fields that begin with `*` go by elapsed time (`cronsim`
follows Debian's cron here).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from functools import lru_cache

from aether.model.errors import BadRequest

_SECOND = 1_000_000
_WINDOWS = tuple(days * 86_400 * _SECOND for days in (1 / 24, 1, 32, 400))


class Schedule:
    def __init__(self, expression: str, timezone: str = "UTC") -> None:
        """Raises BadRequest for what is no schedule, no time zone, or never comes."""
        self.expression, self.timezone = expression, timezone
        self._zone = _zone(timezone)
        if len(expression) > 200 or len(expression.split()) != 5:
            raise BadRequest(
                f"'{expression[:60]}' is no schedule: five fields are wanted (minute, hour, day of month, month, "
                "day of week), as in '*/5 * * * *'"
            )
        from cronsim import CronSim, CronSimError

        self._simulate = CronSim
        try:
            comes = self.following(0) is not None
        except CronSimError as error:
            raise BadRequest(f"'{expression}' is no schedule: {str(error).lower()}") from None
        if not comes:
            raise BadRequest(f"the schedule '{expression}' never comes")

    def following(self, after: int) -> int | None:
        """The first moment later than `after`."""
        return next(self._from(after), None)

    def latest(self, after: int, until: int) -> int | None:
        """The newest moment later than `after` and not later than `until`.

        Looks at the end first, so that a long time between the two costs no more than a short one."""
        for window in (*_WINDOWS, until - after):
            begin = max(after, int(until - window))
            newest = None
            for moment in self._from(begin):
                if moment > until:
                    break
                newest = moment
            if newest is not None or begin == after:
                return newest
        return None

    def _from(self, after: int) -> Iterator[int]:
        begin = datetime.fromtimestamp(after // _SECOND, self._zone)
        for found in self._simulate(self.expression, begin):
            # by wall clock alone a repeated hour reads like the first one
            moment = int(found.timestamp()) * _SECOND
            if moment > after:
                yield moment


@lru_cache(maxsize=64)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not there, no name at all, or a folder
        raise BadRequest(
            f"'{name[:60]}' is no time zone that is known here; use a name such as Europe/Berlin"
        ) from None
