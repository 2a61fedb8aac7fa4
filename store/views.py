"""The views of the ledger that people read: `facts`, `history` and `damage`. They hold nothing of their own."""

FACTS = """
CREATE VIEW facts AS -- every correction: what was asked, what the model said, whether it holds, who, when, why
SELECT
  e.id AS edit_id,
  e.status,                        -- active, reverted, replaced, rejected
  CASE                             -- of an active one, as measured last; NULL: never measured, or not active
    WHEN e.status <> 'active' OR m.reliability IS NULL THEN NULL
    WHEN m.reliability < 1 THEN 'no'
    WHEN min(coalesce((             -- the weakest form, each as it was asked last: an audit may ask some alone
               SELECT min(rate) FROM (
                 SELECT j.value AS rate, max(x.id) FROM measurements x, json_each(x.measured, '$.forms') j
                 WHERE x.edit_id = e.id AND j.value IS NOT NULL GROUP BY j.key)), 1),
             coalesce(json_extract(o.measured, '$.subject_locality'), 1),
             coalesce(m.locality, 1)) < 0.5 THEN 'partly'  -- said, but not in other forms, or others were harmed
    ELSE 'yes' END AS holds,
  e.subject,
  e.prompt,
  (SELECT json_extract(x.measured, '$.before') FROM measurements x WHERE x.id = (
    SELECT min(y.id) FROM edits s JOIN measurements y ON y.edit_id = s.id
    WHERE s.fact_key = e.fact_key AND s.model_id = e.model_id
  )) AS said_before,               -- before this fact was corrected first, whatever was corrected since
  e.target AS right_answer,
  CASE e.status WHEN 'active' THEN json_extract(m.measured, '$.after') END AS says_now,  -- when measured last
  m.reliability AS statement,      -- rates in 0..1
  -- the forms, each when it was asked last
  (SELECT json_extract(x.measured, '$.forms.reworded') FROM measurements x WHERE x.edit_id = e.id
    AND json_extract(x.measured, '$.forms.reworded') IS NOT NULL ORDER BY x.id DESC LIMIT 1) AS reworded,
  (SELECT json_extract(x.measured, '$.forms.chat') FROM measurements x WHERE x.edit_id = e.id
    AND json_extract(x.measured, '$.forms.chat') IS NOT NULL ORDER BY x.id DESC LIMIT 1) AS chat,
  (SELECT json_extract(x.measured, '$.forms.chat_reworded') FROM measurements x WHERE x.edit_id = e.id
    AND json_extract(x.measured, '$.forms.chat_reworded') IS NOT NULL ORDER BY x.id DESC LIMIT 1) AS chat_reworded,
  json_extract(o.measured, '$.subject_locality') AS other_facts,  -- of the subject, that are still said
  m.locality AS other_subjects,    -- whose answers stayed
  m.at AS measured,
  (SELECT json_extract(v.payload, '$.identity') FROM events v WHERE v.seq = p.event_seq) AS identity,
  e.client,
  e.reason,
  e.source,
  e.method,
  e.patch_id AS batch,             -- edits of one call have the same
  n.name AS model,
  e.replaced_by,
  e.created,
  e.changed
FROM edits e
JOIN patches p ON p.id = e.patch_id
JOIN models n ON n.id = e.model_id
LEFT JOIN measurements m ON m.id = (SELECT max(id) FROM measurements WHERE edit_id = e.id)
LEFT JOIN measurements o ON o.id = (
  SELECT max(id) FROM measurements WHERE edit_id = e.id AND json_extract(measured, '$.subject_locality') IS NOT NULL)
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
  CASE WHEN v.kind IN ('applied', 'rejected') THEN coalesce(e.reason, v.reason) ELSE v.reason END AS reason,
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
"""As migration 6 makes them, and 9 `facts` and `history` anew: a change is a new migration that makes a view anew."""
