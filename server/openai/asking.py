"""From a body to questions for the model, one for each choice of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editors.constants import limit
from editors.errors import EditError
from editors.model.lm import LM, Prompt
from editors.patch import save
from server.answering.request import Continuation, OnToken, Request, Steered
from server.errors import ServiceError
from server.openai.bodies import MOST_CHOICES, Body, ChatBody, CompletionBody
from server.openai.errors import ApiError
from server.request_context import RequestContext
from server.steering.doses import dose_asked
from server.steering.requests import DoseRequest
from server.transaction.stack import digest
from server.transaction.workspace import Workspace

CHAT_MOST = limit(
    512,
    "tokens of a chat answer where the client gives no max_tokens",
    "turns at the model: a long answer keeps edits waiting; a longer answer is cut, with finish_reason "
    "length",
)
COMPLETION_MOST = 16
"""The same of /v1/completions, as in OpenAI's own API."""


@dataclass(frozen=True)
class Asked:
    """What a body asks of the model."""

    body: Body
    prompts: list[Prompt]
    ids: list[list[int]]  # of each prompt
    most: int  # tokens to generate at most
    steering: tuple[Steered, ...] = ()

    @property
    def echo(self) -> bool:
        """Whether the answer begins with the prompt."""
        return isinstance(self.body, CompletionBody) and self.body.echo

    def request(self, ctx: RequestContext, on_token: OnToken | None = None) -> Request:
        """The request to the model; the question of choice c of prompt p is number p * n + c."""
        body = self.body
        seeds = [None if body.seed is None else body.seed % 2**62 + c for c in range(body.n)]
        questions = [
            Continuation(
                prompt, self.most, body.temperature, seeds[c], body.top_p, body.stop, body.alternatives
            )
            for prompt in self.prompts
            for c in range(body.n)
        ]
        top = body.alternatives
        reads = [(ids, top) for ids in self.ids] if self.echo and top is not None else []
        return Request(
            questions if self.most else (),
            reads=reads,
            base=body.base,
            steering=self.steering,
            ctx=ctx,
            on_token=on_token,
        )


def asked(workspace: Workspace, body: Body) -> Asked:
    """Raises ApiError for a request that is too long or that this model cannot answer, ServiceError for an unknown
    vector."""
    lm = workspace.lm
    if isinstance(body, ChatBody):
        prompts = [lm.conversation([message.plain() for message in body.messages])]
        wanted, usual = body.most, CHAT_MOST
    else:
        assert isinstance(body, CompletionBody)
        prompts = [_prompt(lm, one) for one in body.prompts]
        wanted, usual = body.max_tokens, COMPLETION_MOST
        _check_echo(lm, body)
    if not 1 <= len(prompts) * body.n <= MOST_CHOICES:
        raise ApiError(
            400, f"1 to {MOST_CHOICES} choices can be asked for at once, prompts times n", "prompt"
        )
    ids = [lm.encode(prompt)[0] for prompt in prompts]
    most = _most(lm, max(map(len, ids)), wanted, usual, body)
    return Asked(body, prompts, ids, most, _steering(workspace, body))


def _steering(workspace: Workspace, body: Body) -> tuple[Steered, ...]:
    """The doses of one request, in the order of their names. Raises ApiError that names the vector at fault."""
    found = []
    for name, one in sorted(body.steering.items()):
        request = DoseRequest(
            name, one.dose, one.layers, one.combine, one.prompt_tokens, mode=one.mode, when=one.when
        )
        try:
            dose = dose_asked(workspace, request)
        except (EditError, ServiceError) as error:
            raise ApiError(400, f"steering.{name[:80]}: {error}", "steering") from None
        if dose is not None:
            found.append(Steered(name, one.dose, digest(save(dose)), dose))
    return tuple(found)


def _most(lm: LM, length: int, wanted: int | None, usual: int, body: Body) -> int:
    """Tokens to generate at most: as wanted, or as usual, within the model's room."""
    limit: int | None = getattr(lm.model.config, "max_position_embeddings", None)
    room = None if limit is None else limit - length
    if room is not None and room < (1 if wanted is None else wanted):
        raise ApiError(
            400,
            f"the prompt has {length} tokens and {wanted or 1} more were requested; the model has room for {limit}",
            "messages" if isinstance(body, ChatBody) else "prompt",
            "context_length_exceeded",
        )
    if wanted == 0 and not (isinstance(body, CompletionBody) and body.echo):
        raise ApiError(400, "max_tokens is 0, which is allowed only with echo=true", "max_tokens")
    if wanted is not None:
        return wanted
    return usual if room is None else min(usual, room)


def _check_echo(lm: LM, body: CompletionBody) -> None:
    if not body.echo or body.logprobs is None:
        return
    if not lm.decoder_reads_prompt:
        raise ApiError(
            400,
            "an encoder-decoder model reads the prompt in its encoder; leave echo or logprobs out",
            "echo",
        )
    if body.stream:
        raise ApiError(400, "echo with logprobs is not streamed; leave stream out", "stream")


def _prompt(lm: LM, given: Any) -> Prompt:
    if isinstance(given, str):
        if not given:
            raise ApiError(400, "prompt is empty; the model needs something to go on from", "prompt")
        return lm.prompt(given, chat=False)
    return _of_ids(lm, given)


def _of_ids(lm: LM, ids: list[int]) -> Prompt:
    """The text of token ids, which must be the ids that this text is tokenised to."""
    size = len(lm.tokenizer)
    if not ids or not all(0 <= i < size for i in ids):
        raise ApiError(400, f"prompt must have token ids from 0 to {size - 1}", "prompt")
    own = lm.encode(lm.prompt("x", chat=False))[0]
    bare = lm.tokenizer("x", add_special_tokens=False)["input_ids"]
    before = own[: len(own) - len(bare)] if own[len(own) - len(bare) :] == bare else []
    kept = ids[len(before) :] if ids[: len(before)] == before else ids
    prompt = lm.prompt(lm.tokenizer.decode(kept), chat=False)
    if lm.encode(prompt)[0] not in (ids, before + ids):
        raise ApiError(
            400,
            "these token ids are not those of their own text, so they cannot be asked; send the text",
            "prompt",
        )
    return prompt
