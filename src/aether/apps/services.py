"""What the API is given to serve apps with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aether.apps.catalogue import Catalogue
from aether.apps.deployments import Deployments
from aether.apps.logs import Logs
from aether.apps.runs import Runs
from aether.apps.volumes import AppVolumes


@dataclass(frozen=True, slots=True)
class AppServices:
    catalogue: Catalogue
    deployments: Deployments
    logs: Logs
    runs: Runs
    volumes: AppVolumes
    url_of: Callable[[str], str]
    """The address at which an app answers, from its name."""
