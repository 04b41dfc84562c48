"""What the API needs of functions, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from aether.functions.catalogue import Catalogue
from aether.functions.code import CodeStore
from aether.functions.invocations import Invocations
from aether.functions.ports import FunctionControl
from aether.functions.runtimes import Runtimes
from aether.model.errors import ServiceUnavailable
from aether.model.function_instance import FunctionState


@dataclass
class FunctionServices:
    catalogue: Catalogue
    codes: CodeStore
    invocations: Invocations
    runtimes: Runtimes
    control: FunctionControl | None = None
    """None where functions are kept and not run."""

    def run_by(self, control: FunctionControl) -> None:
        """From now on functions are run."""
        self.control = self.catalogue.control = control

    def running(self) -> FunctionControl:
        """Raises ServiceUnavailable where functions are not run."""
        if self.control is None:
            raise ServiceUnavailable("functions are not run by this server")
        return self.control

    async def state(self, function_id: str) -> FunctionState:
        """What there is of a function now; nothing where functions are not run."""
        return FunctionState() if self.control is None else await self.control.state(function_id)
