"""Conversion between nested dictionaries and flat ones with dotted names."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a": {"b": x}} for {"a.b": x}."""
    return traverse_util.unflatten_dict(flat, sep=".")


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a.b": x} for {"a": {"b": x}}: the inverse of `nested`."""
    return traverse_util.flatten_dict(tree, sep=".")
