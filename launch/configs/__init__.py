"""Presets: one small file each, opening with the command that runs it and the result to expect."""
