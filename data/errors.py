"""The one exception that means "what the user gave is wrong"."""


class InputError(ValueError):
    """Bad input: a config field, a flag, a file. Its text names the place, the problem and the remedy.

    The command line prints the text alone, without a traceback, and exits with status 2. Several problems found
    at once are joined by newlines, one a line.
    """
