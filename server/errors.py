"""Errors of the services. The agent reads their text."""


class ServiceError(Exception):
    """Base: a request cannot be carried out. The text says why, and what to call instead."""


class Conflict(ServiceError):
    """The edit contradicts an active one."""


class ReadOnly(ServiceError):
    """The server was started read-only, or the ledger is damaged and must not be written."""


class ModelUnavailable(ServiceError):
    """The model could not be loaded; the text says why."""


class Busy(ServiceError):
    """Too many calls wait for the model already."""

    def __init__(self, before: int) -> None:
        super().__init__(
            f"the model is busy: {before} calls are before this one, and no more may wait. Nothing was changed. Try "
            "again in some seconds; list_edits, show_edit and model_status answer meanwhile."
        )
        self.before = before
