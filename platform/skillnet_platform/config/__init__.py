"""TODO: package skillnet_platform.config."""

from skillnet_platform.config.fields import ALIAS, aliased, defaults, positional, to_dict
from skillnet_platform.config.parser import (
    build,
    digest,
    find_config,
    flatten,
    load_layer,
    load_yaml,
    merge,
    parse,
    read_value,
    to_yaml,
)
from skillnet_platform.config.schema import checked

__all__ = [
    "ALIAS",
    "aliased",
    "build",
    "checked",
    "defaults",
    "digest",
    "find_config",
    "flatten",
    "load_layer",
    "load_yaml",
    "merge",
    "parse",
    "positional",
    "read_value",
    "to_dict",
    "to_yaml",
]
