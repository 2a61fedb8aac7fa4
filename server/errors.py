"""Errors of the use cases; their text is what the agent reads."""


class ServiceError(Exception):
    """Base: something asked of the workbench cannot be done; the text says why and what to call instead."""


class Conflict(ServiceError):
    """The edit contradicts an active one."""


class UnknownEdit(ServiceError):
    """No edit has this id."""


class ReadOnly(ServiceError):
    """The server was started read-only, or the ledger is damaged and must not be written."""


class ModelUnavailable(ServiceError):
    """The model could not be loaded; the text says why."""
