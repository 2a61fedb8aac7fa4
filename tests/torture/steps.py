"""The steps of the random walk: a call each, and which states of the ledger it may lead to."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Statuses = Mapping[str, str]
"""Edit id -> status."""
Allowed = Callable[[Statuses, Statuses], bool]
"""Whether a step may lead from one state to the other."""

METHODS = (
    "rome", "r_rome", "t_patcher", "memit", "emmet", "pmet", "alphaedit", "ultraedit", "ft", "lora", "adalora", "ia3",
    "grace", "in_context", "constrained", "wise", "mend", "serac", "auto",
)  # fmt: skip
PLACES = (
    "France",
    "Japan",
    "Peru",
    "Kenya",
    "Norway",
    "Italy",
    "Cuba",
    "Chad",
    "Iran",
    "Laos",
    "Mali",
    "Oman",
)
PROMPTS = ("The capital of {} is", "The language of {} is", "{} lies in", "The king of {} was", "{} exports")
TARGETS = ("Rome", "Paris", "French", "Africa", "oil")
TRAINING = {"rank": 4, "steps": 30, "records": 30, "validation": 6, "evaluate_every": 10, "group": 4}
QUICK = {"max_steps": 3, "steps": 3, "contexts": 1}


def unchanged(before: Statuses, after: Statuses) -> bool:
    """No edit came, went or changed."""
    return before == after


@dataclass(frozen=True)
class Step:
    """One call of a tool."""

    tool: str
    arguments: dict[str, Any]
    allowed: Allowed = unchanged
    then: Callable[[Mapping[str, Any]], None] | None = None  # told what the tool answered

    @property
    def kind(self) -> str:
        return f"{self.tool} {self.arguments.get('method', '')}".strip()


@dataclass
class World:
    """What the walk knows of the server it walks through."""

    chance: random.Random
    fields: Mapping[str, Collection[str]]  # method -> names of its parameters
    statuses: dict[str, str] = field(default_factory=dict)
    bundles: dict[str, int] = field(default_factory=dict)  # name -> edits in it
    adapters: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    doses: dict[str, str] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    proposals: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    made: int = 0

    def having(self, status: str) -> list[str]:
        return [name for name, each in self.statuses.items() if each == status]

    def name(self, what: str) -> str:
        """A new name."""
        self.made += 1
        return f"{what}{self.made}"


def step(world: World) -> Step:
    """A random step that makes sense in this world, or nearly."""
    makers = [maker for maker, weight in WEIGHTS.items() for _ in range(weight)]
    while True:
        if (found := world.chance.choice(makers)(world)) is not None:
            return found


# --- edits ---------------------------------------------------------------------------------------------


def _fact(world: World) -> dict[str, Any]:
    chance = world.chance
    subject, prompt = chance.choice(PLACES), chance.choice(PROMPTS)
    sign = f"In atlas {chance.randrange(6)}, " if chance.random() < 0.7 else ""
    fact: dict[str, Any] = {"subject": subject, "prompt": sign + prompt, "target": chance.choice(TARGETS)}
    if chance.random() < 0.3:
        fact["paraphrases"] = [f"As for {subject}, {prompt}"]
    if chance.random() < 0.3:
        fact["neighbours"] = [{"prompt": prompt.replace("{}", "Spain")}]
    return fact


def _edit_arguments(world: World) -> dict[str, Any]:
    chance, method = world.chance, world.chance.choice(METHODS)
    params = {name: value for name, value in QUICK.items() if name in world.fields.get(method, ())}
    given: dict[str, Any] = {
        "edits": [_fact(world) for _ in range(chance.choice((1, 1, 1, 2, 3)))],
        "method": method,
    }
    if params:
        given["params"] = params
    if chance.random() < 0.15:
        given["guard"] = chance.choice(({"max_drift": 1e-9}, {"min_reliability": 1.0}, {"max_drift": 1e9}))
    return given


def _apply(world: World) -> Step:
    given = _edit_arguments(world)
    if world.chance.random() < 0.5:
        given["replace"] = True
    return Step("apply_edits", given, _adds(len(given["edits"]), given.get("replace", False)))


def _preview(world: World) -> Step:
    return Step("preview_edits", _edit_arguments(world))


def _adds(count: int | None, replaces: bool) -> Allowed:
    """New edits of one status, this many, and active ones that they replaced; nothing else."""

    def allowed(before: Statuses, after: Statuses) -> bool:
        new = [status for name, status in after.items() if name not in before]
        changed = {(before[name], after.get(name)) for name in before if before[name] != after.get(name)}
        if not new:
            return not changed
        one_kind = set(new) == {"active"} or (set(new) == {"rejected"} and not changed)
        return (
            one_kind
            and count in (None, len(new))
            and changed <= ({("active", "replaced")} if replaces else set())
        )

    return allowed


def _moves(ids: Collection[str], there: str) -> Allowed:
    """All of these edits have this status now (those that could get it), and no other edit has changed."""
    come_from = {"reverted": ("active",), "active": ("reverted", "replaced", "rejected")}[there]

    def allowed(before: Statuses, after: Statuses) -> bool:
        whole = {n: there if n in ids and s in come_from else s for n, s in before.items()}
        return after in (whole, before)

    return allowed


def _revert(world: World) -> Step | None:
    active = world.having("active")
    if not active:
        return None
    some = world.chance.sample(active, world.chance.randint(1, min(4, len(active))))
    return Step("revert_edits", {"edit_ids": some}, _moves(some, "reverted"))


def _reapply(world: World) -> Step | None:
    off = [n for n, s in world.statuses.items() if s in ("reverted", "replaced")]
    if not off:
        return None
    some = world.chance.sample(off, world.chance.randint(1, min(3, len(off))))
    return Step("reapply_edits", {"edit_ids": some}, _moves(some, "active"))


def _audit(world: World) -> Step:
    def whole(told: Mapping[str, Any]) -> None:
        integrity = told["integrity"]
        assert integrity == {"chain": True, "blobs": True, "weights": True, "problems": []}, integrity

    some = world.having("active")[:3]
    return Step(
        "audit_edits", {"edit_ids": some or None, "repair": world.chance.random() < 0.3}, unchanged, whole
    )


# --- files ---------------------------------------------------------------------------------------------


def _export(world: World) -> Step | None:
    active = world.having("active")
    if not active:
        return None
    form = world.chance.choice(("patches", "patches", "lora", "lora", "merged", "gguf_lora"))
    given: dict[str, Any] = {"format": form, "name": world.name("x")}
    if world.chance.random() < 0.5:
        given["edit_ids"] = world.chance.sample(active, world.chance.randint(1, min(4, len(active))))

    def note(told: Mapping[str, Any]) -> None:
        if form == "patches":
            world.bundles[str(told["path"])] = len(given.get("edit_ids", active))
        elif form == "lora":
            world.adapters.append(given["name"])

    return Step("export_edits", given, unchanged, note)


def _import_patches(world: World) -> Step | None:
    if not world.bundles:
        return None
    path = world.chance.choice(list(world.bundles))
    dry = world.chance.random() < 0.2
    given = {"path": path, "dry_run": dry}
    return Step("import_patches", given, unchanged if dry else _adds(None, True))


def _import_adapter(world: World) -> Step | None:
    if not world.adapters:
        return None
    given: dict[str, Any] = {
        "path": world.chance.choice(world.adapters),
        "dry_run": world.chance.random() < 0.2,
    }
    if world.chance.random() < 0.5:
        given["edits"] = [_fact(world)]
    return Step("import_adapter", given, unchanged if given["dry_run"] else _adds(1, False))


# --- steering ------------------------------------------------------------------------------------------


def _vector(world: World) -> Step:
    new = not world.vectors or world.chance.random() < 0.6
    name = world.name("v") if new else world.chance.choice(world.vectors)
    words = world.chance.sample(["good", "bad", "glad", "sad", "warm", "cold", "kind", "mean"], 8)
    pairs = [
        {"prompt": f"The weather {i} is", "positive": words[i % 8], "negative": words[(i + 1) % 8]}
        for i in range(8)
    ]
    given = {"name": name, "pairs": pairs, "method": world.chance.choice(("caa", "pca")), "replace": not new}

    def note(told: Mapping[str, Any]) -> None:
        if name not in world.vectors:
            world.vectors.append(name)

    return Step("create_steering_vector", given, unchanged, note)


def _dose(world: World) -> Step | None:
    if not world.vectors:
        return None
    given = {
        "name": world.chance.choice(world.vectors),
        "multiplier": world.chance.choice((0.0, 0.1, 0.2, -0.3)),
        "combine": world.chance.choice(("add", "add", "orthogonal", "ties", "dare")),
    }
    if world.chance.random() < 0.4:
        given["when"] = {
            "vector": world.chance.choice(world.vectors),
            "above": world.chance.choice((-1.0, 0.1)),
        }

    def allowed(before: Statuses, after: Statuses) -> bool:
        gone = [n for n in before if before[n] != after.get(n)]
        off = len(gone) <= 1 and all((before[n], after.get(n)) == ("active", "reverted") for n in gone)
        return _adds(1, True)(before, after) if set(after) - set(before) else off

    return Step("set_steering", given, allowed)


def _delete_vector(world: World) -> Step | None:
    if not world.vectors:
        return None
    name = world.chance.choice(world.vectors)
    return Step("delete_steering_vector", {"name": name}, unchanged, lambda told: world.vectors.remove(name))


def _export_vector(world: World) -> Step | None:
    if not world.vectors:
        return None
    form = world.chance.choice(("gguf", "safetensors"))
    given = {"name": world.chance.choice(world.vectors), "format": form, "file_name": world.name("f")}
    return Step("export_steering_vector", given)


# --- proposals, fact sets ---------------------------------------------------------------------------------


def _propose(world: World) -> Step:
    return Step(
        "propose_edits",
        _edit_arguments(world),
        unchanged,
        lambda told: world.proposals.append(told["proposal_id"]),
    )


def _decide(world: World) -> Step | None:
    if not world.proposals:
        return None
    decision = world.chance.choice(("approve", "approve", "decline", "changes"))
    given = {"proposal_id": world.chance.choice(world.proposals[-3:]), "decision": decision, "note": "a walk"}
    return Step("decide_proposal", given, _adds(None, True) if decision == "approve" else unchanged)


def _save(world: World) -> Step:
    facts = [
        {"subject": fact["subject"], "prompt": fact["prompt"], "answer": fact["target"]}
        for fact in (_fact(world) for _ in range(4))
    ]
    name = world.name("set")
    return Step("save_facts", {"name": name, "facts": facts}, unchanged, lambda told: world.sets.append(name))


# --- jobs, questions -----------------------------------------------------------------------------------


def _train(world: World) -> Step:
    given = {"method": "mend", "params": TRAINING | {"seed": world.chance.randrange(100)}}
    return Step("train_editor", given, unchanged, lambda told: world.jobs.append(told["job_id"]))


def _statistics(world: World) -> Step:
    given: dict[str, Any] = {"layers": world.chance.sample(range(4), 2)}
    if world.chance.random() < 0.5:
        given["tokens"] = world.chance.randint(64, 2000)
    return Step("compute_statistics", given, unchanged, lambda told: world.jobs.append(told["job_id"]))


def _job(world: World) -> Step | None:
    if not world.jobs:
        return None
    tool = world.chance.choice(("get_job", "cancel_job"))
    return Step(tool, {"job_id": world.chance.choice(world.jobs[-3:])})


def _ask(world: World) -> Step:
    fact = _fact(world)
    prompt = fact["prompt"].replace("{}", fact["subject"])
    questions: list[tuple[str, dict[str, Any]]] = [
        (
            "ask_model",
            {"prompt": prompt, "max_new_tokens": 6, "compare_to_base": world.chance.random() < 0.5},
        ),
        (
            "check_facts",
            {"facts": [{"prompt": prompt, "subject": fact["subject"], "expected": fact["target"]}]},
        ),
        ("locate_fact", {"prompt": prompt, "subject": fact["subject"], "method": "logit_lens"}),
        ("suggest_layers", {"edits": [fact], "layers": [1, 2], "params": {"max_steps": 2, "contexts": 1}}),
        ("list_edits", {"text": "capital"}),
        ("list_steering", {}),
        ("query_ledger", {"sql": "SELECT count(*) FROM events"}),
    ]
    if world.statuses:
        questions.append(("show_edit", {"edit_id": world.chance.choice(list(world.statuses))}))
    return Step(*world.chance.choice(questions))


WEIGHTS: dict[Callable[[World], Step | None], int] = {
    _apply: 20, _preview: 4, _revert: 10, _reapply: 10, _audit: 3, _export: 4, _import_patches: 4, _import_adapter: 3,
    _vector: 3, _dose: 6, _delete_vector: 1, _export_vector: 1, _train: 1, _statistics: 2, _job: 2, _ask: 6,
    _propose: 4, _decide: 4, _save: 1,
}  # fmt: skip
