"""The tables of the ledger, as numbered migrations. The database records which ones it has.

A released migration is never edited; a change is a new function at the end of STEPS. SQLite keeps
the comments in the SQL, and `Ledger.schema()` shows them.
"""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from store.canonical import fact_key, now, without_case_and_spacing
from store.chain import NewEvent, append_event
from store.errors import LedgerError, NewerLedger
from store.records import NOBODY
from store.tables import FACT_SETS, PROPOSALS, TABLES, TRIGGERS, VECTORS
from store.views import FACTS, HISTORY, VIEWS


def m0001_ledger(db: Database) -> None:
    """Models, patches, edits, events, measurements, drift, jobs and the search index."""
    for statement in (*TABLES, *TRIGGERS):
        db.execute(statement.strip())


def m0002_vectors(db: Database) -> None:
    """Steering vectors by name."""
    db.execute(VECTORS.strip())


def m0003_models_in_the_chain(db: Database) -> None:
    """An event for every model that was added before models had one, so that the chain covers their rows."""
    for row in db.execute("SELECT * FROM models ORDER BY id").fetchall():
        about = {name: row[name] for name in ("name", "base_hash", "architecture", "created")}
        append_event(db, NewEvent(kind="model_added", payload=about, model_id=row["id"]), NOBODY, now())


def m0004_fact_sets(db: Database) -> None:
    """Lists of right answers, and how each fact stands with each model."""
    for statement in FACT_SETS:
        db.execute(statement.strip())


def m0005_one_normal_form(db: Database) -> None:
    """The keys of edits anew: they disregard kinds of apostrophe and composition of characters now."""
    for row in db.execute("SELECT seq, subject, prompt FROM edits").fetchall():
        keys = [without_case_and_spacing(row["subject"]), fact_key(row["subject"], row["prompt"])]
        db.execute("UPDATE edits SET subject_key = ?, fact_key = ? WHERE seq = ?", [*keys, row["seq"]])


def m0006_views(db: Database) -> None:
    """Views for people: facts, history, damage."""
    for view in VIEWS:
        db.execute(view.strip())


def m0007_proposals(db: Database) -> None:
    """Edits that wait for a decision."""
    db.execute(PROPOSALS.strip())
    db.execute("CREATE INDEX proposals_state ON proposals(state, seq)")


def m0008_facts_keep_what_was_asked_of_forms(db: Database) -> None:
    """The view facts takes forms from the measurement that asked them last, not from any later one."""
    db.execute("DROP VIEW facts")
    db.execute(FACTS.strip())


def m0009_facts_take_every_form_and_the_first_answer(db: Database) -> None:
    """The view facts judges by each form as it was asked last, and says what was said before the first correction.

    The view history gives the reason of an edit where the edits of one call had reasons of their own.
    """
    for name, view in (("facts", FACTS), ("history", HISTORY)):
        db.execute(f"DROP VIEW {name}")
        db.execute(view.strip())


STEPS = (
    m0001_ledger,
    m0002_vectors,
    m0003_models_in_the_chain,
    m0004_fact_sets,
    m0005_one_normal_form,
    m0006_views,
    m0007_proposals,
    m0008_facts_keep_what_was_asked_of_forms,
    m0009_facts_take_every_form_and_the_first_answer,
)
migrations = Migrations("errata")
for _step in STEPS:
    migrations(name=_step.__name__)(_step)


def is_behind(db: Database) -> bool:
    """True if migrations are due."""
    return bool(migrations.pending(db))


def migrate(db: Database, write: bool) -> None:
    """Run the migrations that are due, each in one transaction with its record.

    Raises NewerLedger if the database has migrations that this version does not know, and
    LedgerError if migrations are due but `write` is False.
    """
    unknown = {m.name for m in migrations.applied(db)} - {step.__name__ for step in STEPS}
    if unknown:
        raise NewerLedger(
            f"it was written by a newer version ({', '.join(sorted(unknown))}); upgrade errata-mcp"
        )
    if write:
        migrations.apply(db)
    elif migrations.pending(db):
        raise LedgerError(
            "it was written by an older version; start once without --read-only to bring it up to date"
        )
