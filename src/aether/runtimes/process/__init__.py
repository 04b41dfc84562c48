"""Runs an instance as a sandboxed process on this machine."""

from aether.runtimes.process.report import SandboxReport
from aether.runtimes.process.runtime import ProcessRuntime, RuntimeOptions

__all__ = ["ProcessRuntime", "RuntimeOptions", "SandboxReport"]
