"""Errors of the use cases; their text is what the agent reads."""


class WorkbenchError(Exception):
    """Base: something asked of the workbench cannot be done; the text says why and what to call instead."""


class Conflict(WorkbenchError):
    """The edit contradicts an active one."""


class UnknownEdit(WorkbenchError):
    """No edit has this id."""


class ReadOnly(WorkbenchError):
    """The server was started read-only, or the ledger is damaged and must not be written."""


class ModelUnavailable(WorkbenchError):
    """The model could not be loaded; the text says why."""
