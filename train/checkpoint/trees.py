"""State as nested dictionaries that Orbax stores, and back."""

from collections.abc import Mapping
from typing import Any


def plain(tree: Any) -> Any:
    """Named tuples (Optax's states) as dictionaries by their fields' names; empty ones left out."""
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        branches = {name: plain(branch) for name, branch in tree.items()}
        return {name: branch for name, branch in branches.items() if not isinstance(branch, dict) or branch}
    return tree


def like(template: Any, tree: Any) -> Any:
    """The inverse of `plain`: the values of `tree` in the containers of `template`."""
    if isinstance(template, tuple) and hasattr(template, "_asdict"):
        fields = template._asdict()
        return type(template)(**{name: like(fields[name], tree.get(name, {})) for name in fields})
    if isinstance(template, Mapping):
        branches = {name: like(branch, tree.get(name, {})) for name, branch in template.items()}
        return type(template)(branches)  # type: ignore[call-arg]
    return tree
