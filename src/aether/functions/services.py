"""What the API needs of functions, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from aether.functions.catalogue import Catalogue
from aether.functions.code import CodeStore
from aether.functions.invocations import Invocations
from aether.functions.ports import FunctionControl


@dataclass(frozen=True, slots=True)
class FunctionServices:
    catalogue: Catalogue
    codes: CodeStore
    invocations: Invocations
    control: FunctionControl
