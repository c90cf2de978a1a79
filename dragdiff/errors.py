"""The one exception that stands for a mistake of the user, not of the program."""


class UserError(Exception):
    """Something that the user can mend: says what is wrong, with which value, and what to do.

    The command line prints its message as one line and exits with code 2.
    """
