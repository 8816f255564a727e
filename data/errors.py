"""The exception tree of the project. Each text is written for a person: one clause per problem, with its remedy."""


class InputError(ValueError):
    """Bad input: a config field, a flag or a file. The text names the place, the problem and the remedy.

    The command line prints the text without a traceback and exits with status 2. Several problems found at once are
    joined by newlines.
    """


class Fault(Exception):
    """A transient failure of machine, network or device: restarting may succeed. Exit status 1."""


class StorageError(Exception):
    """A run cannot write: a disk is full or gone, or a bucket refuses. The text is one line for a person.

    It is a fault, not the user's mistake: once it is mended, the same command resumes. Exit status 1.
    """


class BadText(ValueError):
    """A document, or the rest of a file, that cannot be read.

    The text names the problem without the file. The corpus decides whether it ends the run or is skipped.
    """


class ChangedFile(BadText):
    """A file that vanished or changed after it was listed. A new start lists it again, and says what has changed."""
