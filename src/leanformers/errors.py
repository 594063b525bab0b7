"""The one error that users see: a sentence, not a traceback; and the one exception that none of them sees."""


class LeanError(ValueError):
    """Bad input, said in one sentence that names the file, field or layer and the remedy.

    The command line prints it and exits with code 2.
    """


class Enough(Exception):
    """All that was asked for has been seen: the rest of a forward pass need not run. Whoever raises it catches it."""
