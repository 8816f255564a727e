"""Converts the state to the nested dictionaries that Orbax stores, and back."""

from collections.abc import Mapping
from typing import Any


def to_plain_tree(tree: Any) -> Any:
    """Converts named tuples (Optax's states) to dictionaries by their fields' names, without empty ones."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        branches = {name: to_plain_tree(branch) for name, branch in tree.items()}
        return {name: branch for name, branch in branches.items() if not isinstance(branch, dict) or branch}
    return tree


def restore_structure(template: Any, tree: Any) -> Any:
    """Inverts `to_plain_tree`: returns the values of `tree` in the containers of `template`."""
    if isinstance(template, tuple) and hasattr(template, "_asdict"):
        fields = template._asdict()
        return type(template)(**{name: restore_structure(fields[name], tree.get(name, {})) for name in fields})
    if isinstance(template, Mapping):
        branches = {name: restore_structure(branch, tree.get(name, {})) for name, branch in template.items()}
        return type(template)(branches)  # type: ignore[call-arg]
    return tree
