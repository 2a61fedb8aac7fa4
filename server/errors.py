"""Errors of the services. The agent reads their text."""


class ServiceError(Exception):
    """Base: a request cannot be carried out. The text says why, and what to call instead."""


class Conflict(ServiceError):
    """The edit contradicts an active one."""


class ReadOnly(ServiceError):
    """The server was started read-only, or the ledger is damaged and must not be written."""


class ModelUnavailable(ServiceError):
    """The model could not be loaded; the text says why."""
