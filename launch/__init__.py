"""The program `ziggurat`: the command line, one thin module a command, presets and pages.

cli is the program, commands the table of commands and their parser; arguments and columns are shared by commands. The
presets are in `configs/`, HTML pages in `page/`. May import from all other rooms. Modules of commands import JAX only
in `run`, so that --help and completion are fast.

Words:

- A preset is a Python file whose `get_config` returns the fields that differ from the defaults.
- An override is a flag `--config.GROUP.FIELD=VALUE`, which wins over the preset.
- RUN is a run's folder, RUN@STEP one of its checkpoints, and WEIGHTS a folder of exported weights.
"""
