"""The exceptions of the project.

Every message is one sentence for the user: what was given, what is needed, what to do next. The command line prints it
on one line and exits with `exit_code`; a traceback is printed only with `--debug`.
"""


class Scail2Error(Exception):
    """A fault during the work: a stage failed, the disk is full, a decoder stopped."""

    exit_code = 1


class InputError(Scail2Error):
    """A mistake in the user's input: a file, an option, an engine folder that does not match."""

    exit_code = 2
