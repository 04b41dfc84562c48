"""YAML as lockfiles use it: every scalar stays the text it is written as ("1.10" is no number)."""

from typing import Any, cast

import yaml

from aether.model.errors import ConfigError

_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def read_yaml(text: str) -> dict[str, Any]:
    """The mapping in `text`. Raises ConfigError."""
    try:
        # the base loader makes nothing but texts, lists and mappings
        value: object = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ConfigError(f"the lockfile is not YAML: {error}") from error
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
