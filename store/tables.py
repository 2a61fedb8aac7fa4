"""The SQL of the ledger's tables, as released migrations create them; it is never edited."""

from __future__ import annotations

TABLES = (
    """
CREATE TABLE models ( -- every model this ledger has edited
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,              -- as it was asked for when first seen
  base_hash TEXT NOT NULL UNIQUE,  -- SHA-256 over the pristine weights; names the model
  architecture TEXT NOT NULL,
  created TEXT NOT NULL            -- all times: ISO 8601, UTC, microseconds
)""",
    """
CREATE TABLE events ( -- the history: append-only, hash-chained; every other table follows from it
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  at TEXT NOT NULL,
  kind TEXT NOT NULL,              -- applied, rejected, reverted, reapplied, replaced, measured ...
  model_id INTEGER REFERENCES models(id),
  edit_ids TEXT NOT NULL CHECK (json_valid(edit_ids)),  -- JSON list of the edits it is about
  client TEXT,                     -- who asked: name, version, id of the request
  client_version TEXT,
  request_id TEXT,
  reason TEXT,
  weights_hash TEXT,               -- SHA-256 of the live weights after it; NULL: the weights stayed
  state_hash TEXT,                 -- SHA-256 of weights and attached patches, where known
  payload TEXT NOT NULL CHECK (json_valid(payload)),  -- JSON: everything the event changed
  prev_hash TEXT NOT NULL,         -- hash of the event before; '' for the first
  hash TEXT NOT NULL               -- SHA-256 of prev_hash and the canonical JSON of the other columns
)""",
    "CREATE INDEX events_state ON events(model_id, seq) WHERE weights_hash IS NOT NULL",
    """
CREATE TABLE event_edits ( -- which events are about which edit; filled by a trigger
  edit_id TEXT NOT NULL,
  seq INTEGER NOT NULL REFERENCES events(seq),
  PRIMARY KEY (edit_id, seq)
) WITHOUT ROWID""",
    """
CREATE TABLE patches ( -- one call of apply is one patch: a slot that keeps its position for ever
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  model_id INTEGER NOT NULL REFERENCES models(id),
  position INTEGER NOT NULL,       -- place in ledger order: active patches are added to the weights in it
  method TEXT NOT NULL,
  kind TEXT NOT NULL,              -- weight, hook, route, adapter
  params TEXT NOT NULL CHECK (json_valid(params)),  -- JSON
  source_blob TEXT NOT NULL,       -- SHA-256 of the file with the patch as computed for the whole call
  blob TEXT,                       -- the patch live now; NULL when no edit of the call is active
  seconds REAL NOT NULL,
  environment TEXT NOT NULL CHECK (json_valid(environment)),  -- JSON: versions, device, dtype, threads
  base_hash TEXT NOT NULL,
  weights_hash_before TEXT NOT NULL,
  weights_hash_after TEXT NOT NULL,
  state_hash TEXT,
  event_seq INTEGER NOT NULL REFERENCES events(seq),  -- the event that recorded it
  created TEXT NOT NULL,
  UNIQUE (model_id, position)
)""",
    """
CREATE TABLE edits ( -- one fact corrected (or tried), one row of a patch
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,         -- 'e1', 'e2' ...
  patch_id INTEGER NOT NULL REFERENCES patches(id),
  "row" INTEGER NOT NULL,          -- index in the call
  model_id INTEGER NOT NULL REFERENCES models(id),
  status TEXT NOT NULL CHECK (status IN ('active', 'reverted', 'replaced', 'rejected')),
  request TEXT NOT NULL CHECK (json_valid(request)),  -- JSON: the edit as asked for
  subject TEXT NOT NULL,
  prompt TEXT NOT NULL,
  target TEXT NOT NULL,
  previous TEXT,
  method TEXT NOT NULL,
  reason TEXT,
  source TEXT,                     -- where the right answer comes from
  client TEXT,
  client_version TEXT,
  request_id TEXT,
  replaced_by TEXT REFERENCES edits(id) DEFERRABLE INITIALLY DEFERRED,
  weights_hash_before TEXT NOT NULL,
  weights_hash_after TEXT NOT NULL,
  subject_key TEXT NOT NULL,       -- subject without regard to case and spacing
  fact_key TEXT NOT NULL,          -- digest of subject and prompt: the same for the same question
  created TEXT NOT NULL,
  changed TEXT NOT NULL,           -- last change of status
  UNIQUE (patch_id, "row")
)""",
    "CREATE INDEX edits_status ON edits(model_id, status, seq)",
    "CREATE INDEX edits_fact ON edits(fact_key, model_id, status)",
    "CREATE INDEX edits_subject ON edits(subject_key)",
    "CREATE INDEX edits_replaced_by ON edits(replaced_by) WHERE replaced_by IS NOT NULL",
    """
CREATE TABLE measurements ( -- how well an edit held, each time it was measured
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  edit_id TEXT NOT NULL REFERENCES edits(id),
  event_seq INTEGER NOT NULL REFERENCES events(seq),
  at TEXT NOT NULL,
  occasion TEXT NOT NULL,          -- apply, reapply, audit ...
  reliability REAL,                -- rates in 0..1; NULL when there was nothing to measure them with
  generality REAL,
  locality REAL,
  portability REAL,
  measured TEXT NOT NULL CHECK (json_valid(measured))  -- JSON: everything measured
)""",
    "CREATE INDEX measurements_edit ON measurements(edit_id, id)",
    """
CREATE TABLE drift ( -- how far the live model had moved from the pristine one
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  event_seq INTEGER NOT NULL REFERENCES events(seq),
  model_id INTEGER NOT NULL REFERENCES models(id),
  at TEXT NOT NULL,
  occasion TEXT NOT NULL,
  kl REAL,                         -- mean KL divergence on canary texts, nats
  perplexity_before REAL,
  perplexity_after REAL,
  measured TEXT NOT NULL CHECK (json_valid(measured))
)""",
    "CREATE INDEX drift_model ON drift(model_id, id)",
    """
CREATE TABLE jobs ( -- long work: training, statistics
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,         -- 'j1', 'j2' ...
  kind TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled', 'interrupted')),
  request TEXT NOT NULL CHECK (json_valid(request)),
  progress REAL NOT NULL DEFAULT 0,  -- 0..1
  message TEXT NOT NULL DEFAULT '',
  metrics TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(metrics)),
  result TEXT CHECK (result IS NULL OR json_valid(result)),
  eta_seconds REAL,
  client TEXT,
  created TEXT NOT NULL,
  started TEXT,
  updated TEXT NOT NULL,
  finished TEXT
)""",
    "CREATE INDEX jobs_state ON jobs(state, seq)",
    """
CREATE VIRTUAL TABLE edits_fts USING fts5( -- search: SELECT * FROM edits WHERE seq IN
  subject, prompt, target, reason,         --   (SELECT rowid FROM edits_fts WHERE edits_fts MATCH 'word')
  content='edits', content_rowid='seq', tokenize='unicode61 remove_diacritics 2'
)""",
)


VECTORS = """
CREATE TABLE vectors ( -- steering vectors that can be switched on; those that act are edits of method steering
  model_id INTEGER NOT NULL REFERENCES models(id),
  name TEXT NOT NULL,
  method TEXT NOT NULL,            -- caa, pca, lm_steer, prompt
  blob TEXT NOT NULL,              -- SHA-256 of its file
  about TEXT NOT NULL CHECK (json_valid(about)),  -- JSON: layers, norms, separation, doses
  reason TEXT,
  client TEXT,
  event_seq INTEGER NOT NULL REFERENCES events(seq),  -- the event that recorded it
  created TEXT NOT NULL,
  PRIMARY KEY (model_id, name)
)"""


FACT_SETS = (
    """
CREATE TABLE fact_sets ( -- lists of right answers by name; of any model
  name TEXT PRIMARY KEY,
  version INTEGER NOT NULL,
  about TEXT NOT NULL CHECK (json_valid(about)),  -- JSON: where it came from, how it was read
  event_seq INTEGER NOT NULL REFERENCES events(seq),  -- the event of this version
  created TEXT NOT NULL,
  changed TEXT NOT NULL
)""",
    """
CREATE TABLE set_facts ( -- the facts of the sets, as their last version has them
  set_name TEXT NOT NULL REFERENCES fact_sets(name),
  number INTEGER NOT NULL,         -- stays with the fact from version to version
  key TEXT NOT NULL,               -- as fact_key of edits
  since INTEGER NOT NULL,          -- the version in which it became what it is
  fact TEXT NOT NULL CHECK (json_valid(fact)),  -- JSON: subject, prompt, answer and more
  PRIMARY KEY (set_name, number)
)""",
    """
CREATE TABLE fact_states ( -- how facts stand with a model; working state, without events
  set_name TEXT NOT NULL,
  number INTEGER NOT NULL,
  model_id INTEGER NOT NULL REFERENCES models(id),
  verdict TEXT,                    -- agrees, differs, unsure
  was TEXT,                        -- the verdict of the check before
  answer TEXT,                     -- what the model said
  p_answer REAL,                   -- probability of that, and of the right answer
  p_expected REAL,
  state_hash TEXT,                 -- of the model that was asked
  checked TEXT,
  outcome TEXT,                    -- of the last correction: planned, done, failed, right, skipped, lost
  why TEXT,
  edit_id TEXT,                    -- the edit that corrected it last
  job_id TEXT,                     -- the job of the outcome
  PRIMARY KEY (set_name, number, model_id)
)""",
)


PROPOSALS = """
CREATE TABLE proposals ( -- edits that were computed and measured, and wait for a decision, or had one
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,         -- 'p1', 'p2' ...
  model_id INTEGER NOT NULL REFERENCES models(id),
  state TEXT NOT NULL CHECK (state IN ('waiting', 'approved', 'declined', 'changes')),
  request TEXT NOT NULL CHECK (json_valid(request)),  -- JSON: what apply_edits would be called with
  report TEXT NOT NULL CHECK (json_valid(report)),    -- JSON: what the preview measured
  states TEXT NOT NULL CHECK (json_valid(states)),    -- JSON: the hashes it was measured on, and after it
  blob TEXT,                       -- SHA-256 of the file with the patch as computed
  reason TEXT,
  source TEXT,
  client TEXT,                     -- who proposed: the name the client gave itself, and whose token it had
  identity TEXT,
  event_seq INTEGER NOT NULL REFERENCES events(seq),  -- the event that recorded it
  created TEXT NOT NULL,
  decided TEXT,                    -- when, and by whom
  decided_client TEXT,
  decided_identity TEXT,
  note TEXT,                       -- what was said with the decision
  edit_ids TEXT NOT NULL CHECK (json_valid(edit_ids))  -- JSON list: the edits it became
)"""


_FTS_NEW = """INSERT INTO edits_fts(rowid, subject, prompt, target, reason)
  VALUES (new.seq, new.subject, new.prompt, new.target, new.reason);"""


_FTS_OLD = """INSERT INTO edits_fts(edits_fts, rowid, subject, prompt, target, reason)
  VALUES ('delete', old.seq, old.subject, old.prompt, old.target, old.reason);"""


TRIGGERS = (
    """
CREATE TRIGGER events_in_order BEFORE INSERT ON events
WHEN new.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM events)
BEGIN SELECT RAISE(ABORT, 'events are append-only: the next seq is the last plus one'); END""",
    """
CREATE TRIGGER events_no_update BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """
CREATE TRIGGER events_no_delete BEFORE DELETE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """
CREATE TRIGGER events_name_edits AFTER INSERT ON events
BEGIN
  INSERT INTO event_edits(edit_id, seq) SELECT DISTINCT value, new.seq FROM json_each(new.edit_ids);
END""",
    """
CREATE TRIGGER event_edits_no_update BEFORE UPDATE ON event_edits
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """
CREATE TRIGGER event_edits_no_delete BEFORE DELETE ON event_edits
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    f"CREATE TRIGGER edits_fts_insert AFTER INSERT ON edits BEGIN {_FTS_NEW} END",
    f"CREATE TRIGGER edits_fts_delete AFTER DELETE ON edits BEGIN {_FTS_OLD} END",
    f"""CREATE TRIGGER edits_fts_update AFTER UPDATE OF subject, prompt, target, reason ON edits
BEGIN {_FTS_OLD} {_FTS_NEW} END""",
)


GUARDS = frozenset(
    {
        "events_in_order",
        "events_no_update",
        "events_no_delete",
        "event_edits_no_update",
        "event_edits_no_delete",
    }
)
