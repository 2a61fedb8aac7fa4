"""The views of the ledger that people read: `facts`, `history` and `damage`. They hold nothing of their own."""

FACTS = """
CREATE VIEW facts AS -- every correction: what was asked, what the model said, whether it holds, who, when, why
SELECT
  e.id AS edit_id,
  e.status,                        -- active, reverted, replaced, rejected
  CASE                             -- of an active one, as measured last; NULL: never measured, or not active
    WHEN e.status <> 'active' OR m.reliability IS NULL THEN NULL
    WHEN m.reliability < 1 THEN 'no'
    WHEN min(coalesce(json_extract(w.measured, '$.forms.reworded'), 1),
             coalesce(json_extract(c.measured, '$.forms.chat'), 1),
             coalesce(json_extract(c.measured, '$.forms.chat_reworded'), 1),
             coalesce(json_extract(m.measured, '$.subject_locality'),
                      json_extract(w.measured, '$.subject_locality'),
                      json_extract(c.measured, '$.subject_locality'), 1),
             coalesce(m.locality, 1)) < 0.5 THEN 'partly'  -- said, but not in other forms, or others were harmed
    ELSE 'yes' END AS holds,
  e.subject,
  e.prompt,
  json_extract(f.measured, '$.before') AS said_before,
  e.target AS right_answer,
  CASE e.status WHEN 'active' THEN json_extract(m.measured, '$.after') END AS says_now,  -- when measured last
  m.reliability AS statement,      -- rates in 0..1
  json_extract(w.measured, '$.forms.reworded') AS reworded,  -- when other forms were asked last
  json_extract(c.measured, '$.forms.chat') AS chat,
  coalesce(json_extract(m.measured, '$.subject_locality'), json_extract(w.measured, '$.subject_locality'),
    json_extract(c.measured, '$.subject_locality')) AS other_facts,  -- of the subject, that are still said
  m.locality AS other_subjects,    -- whose answers stayed
  m.at AS measured,
  (SELECT json_extract(v.payload, '$.identity') FROM events v WHERE v.seq = p.event_seq) AS identity,
  e.client,
  e.reason,
  e.source,
  e.method,
  e.patch_id AS batch,             -- edits of one call have the same
  o.name AS model,
  e.replaced_by,
  e.created,
  e.changed
FROM edits e
JOIN patches p ON p.id = e.patch_id
JOIN models o ON o.id = e.model_id
LEFT JOIN measurements m ON m.id = (SELECT max(id) FROM measurements WHERE edit_id = e.id)
LEFT JOIN measurements w ON w.id = (  -- an audit may ask the prompt alone, or chat alone
  SELECT max(id) FROM measurements WHERE edit_id = e.id AND instr(measured, '"reworded":') > 0)
LEFT JOIN measurements c ON c.id = (
  SELECT max(id) FROM measurements WHERE edit_id = e.id AND instr(measured, '"forms":{"chat":') > 0)
LEFT JOIN measurements f ON f.id = (SELECT min(id) FROM measurements WHERE edit_id = e.id)
WHERE e.method <> 'steering' AND json_extract(e.request, '$.states_no_fact') IS NULL
"""

HISTORY = """
CREATE VIEW history AS -- everything that happened, once for each edit that it is about
SELECT
  v.seq,
  v.at,
  v.kind AS what,                  -- applied, rejected, reverted, reapplied, replaced, measured ...
  x.edit_id,
  e.subject,
  e.prompt,
  e.target AS right_answer,
  json_extract(v.payload, '$.identity') AS identity,  -- whose token the call had, checked by the server
  v.client,                        -- the name that the client gave itself
  v.reason,
  json_extract(v.payload, '$.failed') AS failed_bounds,
  v.weights_hash,
  v.hash
FROM events v
LEFT JOIN event_edits x ON x.seq = v.seq
LEFT JOIN edits e ON e.id = x.edit_id
"""

DAMAGE = """
CREATE VIEW damage AS -- every other fact that was seen to change with a correction, each time it was measured
SELECT
  m.edit_id,
  e.status,
  e.subject,
  e.target AS right_answer,
  m.at,
  m.occasion,                      -- apply, reapply, audit ...
  json_extract(d.value, '$.kind') AS kind,  -- sibling, hold: of the same subject; neighbour: of another one
  json_extract(d.value, '$.prompt') AS prompt,
  json_extract(d.value, '$.expected') AS expected,
  json_extract(d.value, '$.before') AS said_before,
  json_extract(d.value, '$.after') AS said_after,
  t.kl,                            -- the whole model then: mean KL from the pristine one on canary texts, nats
  t.perplexity_before,             -- of the pristine model on them
  t.perplexity_after               -- of the live one
FROM measurements m
JOIN edits e ON e.id = m.edit_id
JOIN json_each(m.measured, '$.details') d
LEFT JOIN drift t ON t.event_seq = m.event_seq
WHERE json_extract(d.value, '$.held') = 0
  AND json_extract(d.value, '$.kind') IN ('neighbour', 'sibling', 'hold')
"""

VIEWS = (FACTS, HISTORY, DAMAGE)
"""As migration 6 makes them, and 8 makes `facts` anew: a change is a new migration that drops and makes a view."""
