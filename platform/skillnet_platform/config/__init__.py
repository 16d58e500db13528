"""Typed configuration: dataclasses, YAML files and command-line overrides.

:func:`parse_config` builds a dataclass from a command line; errors name the key and the file.
"""

from skillnet_platform.config.builder import build_config
from skillnet_platform.config.fields import (
    ALIAS,
    aliased_field,
    choices_field,
    command_field,
    default_values,
    fixed_field,
    positional_field,
    to_dict,
)
from skillnet_platform.config.parser import (
    digest_config,
    flatten_tree,
    load_layer,
    load_yaml,
    merge_trees,
    parse_config,
    read_value,
    to_yaml,
)
from skillnet_platform.config.presets import find_config
from skillnet_platform.config.schema import check_keys
