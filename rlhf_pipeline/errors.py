"""The exceptions that the command line prints without a traceback.

Exception
  UserError             the user can mend it: exit status 2, one message
    NotFinishedError    an earlier stage has not made what this one needs
    WaitingError        it is people's turn
    DiskError           a disk is full, or may not be written
    LostProcessError    of several processes one has ended, and the others with it
"""


class UserError(Exception):
    """Something the user can mend. The message names the thing, what is allowed and the fix."""

    kind = "error: "  # what the command line says before the message
    shared = True  # of several processes all find it


class NotFinishedError(UserError):
    """What an earlier stage should have made is not there."""


class WaitingError(UserError):
    """People have not done their part yet. The message says how far they are."""

    kind = ""


class DiskError(UserError):
    """A disk is full, or may not be written."""

    shared = False


class LostProcessError(UserError):
    """Another process has ended, by itself or by another hand."""

    kind = "stopped: "
    shared = False
