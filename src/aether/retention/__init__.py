"""Taking away what nobody needs any more: chores of other capabilities, run now and then by one server at a time."""

from aether.retention.service import Chore, Retention, Swept

__all__ = ["Chore", "Retention", "Swept"]
