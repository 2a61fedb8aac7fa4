"""A read-only server follows the one that writes: a moment after that one records a change, this model has it too."""

from __future__ import annotations

import logging
import threading

from editors.errors import EditError
from server.transaction.replay import active_stack
from server.transaction.workspace import Workspace
from store.errors import LedgerError

log = logging.getLogger("errata.following")

PAUSE = 0.2
"""Seconds between two looks at the ledger; a look takes microseconds when nothing was written."""


class Follower:
    """Replays what another process writes to the ledger: soon after it was written, and before any turn at the model.

    So whoever has a turn finds the model as the ledger has it.
    """

    def __init__(self, workspace: Workspace, pause: float = PAUSE) -> None:
        self._workspace, self._pause = workspace, pause
        self._behind = False  # something was written that the model does not have yet
        workspace.catch_up = self._catch_up
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="errata-following", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a replay that runs is waited for."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                if self._look():
                    with self._workspace.turn(bounded=False):
                        pass  # it begins by catching up
            except (LedgerError, EditError) as error:
                log.error("what another server wrote cannot be followed: %s", error)

    def _look(self) -> bool:
        self._behind = self._workspace.ledger.changed() or self._behind
        return self._behind

    def _catch_up(self) -> None:
        try:
            if self._look():
                self._behind = False
                follow(self._workspace)
        except (LedgerError, EditError) as error:
            log.error("what another server wrote cannot be followed: %s", error)


def follow(workspace: Workspace) -> None:
    """Put the patches that the ledger has as active on the model. Raises LedgerError or EditError."""
    with workspace.turn(bounded=False):
        if workspace.model_id is None:
            workspace.model_id = workspace.ledger.find_model(workspace.host.base_hash)
        if workspace.model_id is not None:
            workspace.host.set_stack(active_stack(workspace, workspace.model_id))
