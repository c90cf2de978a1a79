"""The one exception that stands for a mistake of the user, not of the program; and how to quote others in it."""


class UserError(Exception):
    """Something that the user can mend: says what is wrong, with which value, and what to do.

    The command line prints its message as one line and exits with code 2.
    """


def one_line(error: BaseException) -> str:
    """The text of somebody else's exception on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
