"""Settings of a run: one dataclass a group, how they are read and checked, and what may change on resume."""
