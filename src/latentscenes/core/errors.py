"""Exceptions that do not mean a bug in the program."""


class UserError(Exception):
    """An input is wrong. The message names the file or setting, the problem and the remedy; the command line
    prints it without a traceback."""


class Damaged(UserError):
    """A file is absent, empty, cut or changed. Not raised where the user merely may not read it."""


class Interrupted(Exception):
    """Learning was stopped by Ctrl-C or SIGTERM, after saving everything."""
