"""The exceptions whose text is all that a person needs."""


class InputError(ValueError):
    """Bad input: a config field, a flag, a file. Its text names the place, the problem and the remedy.

    The command line prints the text alone, without a traceback, and exits with status 2. Several problems found
    at once are joined by newlines, one a line.
    """


class Fault(Exception):
    """What is wrong with neither the input nor this program, and a new start may find mended: exit status 1."""


class StorageError(Exception):
    """What a run writes cannot be written: a disk is full or gone, a bucket refuses. Its text is one line for a person.

    It is a fault, not the user's error: once it is mended, the same command goes on.
    """


class BadText(ValueError):
    """A document, or the rest of a file, that cannot be read.

    Its text says the problem, without the file's name. The corpus decides whether it ends the run or is skipped.
    """
