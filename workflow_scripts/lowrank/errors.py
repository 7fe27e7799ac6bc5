"""The one exception that a user is meant to read."""


class RankwiseError(Exception):
    """Something the user can put right: the message says what is wrong, where, and what to do.

    Stages and the Snakefile print the message without a traceback and exit with code 1.
    """
