"""Errors an editor raises; every message names the value that was wrong and the way out."""


class EditError(Exception):
    """Base of everything that can go wrong while an edit is described, computed or measured."""


class InvalidEdit(EditError):
    """The request itself is wrong: the message names the field, the value and how to mend it."""


class Unsupported(EditError):
    """The method cannot work on this model family or layer; the message says what would."""


class NotReady(EditError):
    """The method needs something first (statistics, training); the message says which call makes it."""


class Cancelled(EditError):
    """The caller cancelled the work; nothing was changed."""
