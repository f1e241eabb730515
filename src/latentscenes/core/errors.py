"""The exceptions that are no faults of the program."""


class UserError(Exception):
    """Something the user gave is wrong. The message names the file or setting, says what is wrong and
    what to do; the command line prints it without a traceback."""


class Interrupted(Exception):
    """Learning was stopped by Ctrl-C or a polite kill, after saving everything."""
