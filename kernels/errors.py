"""The one exception family of the project.

Every message is a sentence for the user: what was given, what is needed, what to do next. The command line prints
it on one line and exits with `exit_code`; a traceback appears only with `--debug`.
"""


class Scail2Error(Exception):
    """A fault while doing what was asked: a stage failed, the disk filled, a decoder gave up."""

    exit_code = 1


class InputError(Scail2Error):
    """Something the user gave cannot work: a file, an option, an engine folder that does not match."""

    exit_code = 2
