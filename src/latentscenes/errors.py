"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Something the user gave is wrong. The message names the file or setting, says what is wrong and
    what to do; the command line prints it without a traceback."""
