"""The exceptions that the command line prints without a traceback.

Exception
  UserError             the user can fix it: one message, exit status 2
    NotFinishedError    an earlier stage has not made the input of this one
    WaitingError        the run waits for people to label answers
    DiskError           a disk is full or not writable
    LostProcessError    another process of the run has exited, so this one stops
"""


class UserError(Exception):
    """An error that the user can fix. The message names the thing, what is allowed and the fix."""

    kind = "error: "  # printed before the message
    shared = True  # with several processes, all of them raise it


class NotFinishedError(UserError):
    """The output of an earlier stage is missing."""


class WaitingError(UserError):
    """The run waits for people to label answers. The message says how many are labelled."""

    kind = ""


class DiskError(UserError):
    """A disk is full or not writable."""

    shared = False


class LostProcessError(UserError):
    """Another process of the run has exited or was killed."""

    kind = "stopped: "
    shared = False
