"""OpenAI clients at /v1: the official client and curl, against the real HTTP server."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest
import torch
import uvicorn
from openai import OpenAI
from pydantic import SecretStr

from editors.edit import Edit
from editors.steering.pairs import Pair
from errata import build, http_app
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import Startup
from server.steering.requests import DoseRequest, VectorRequest, When
from tests import device
from tests.families import save_to
from tests.server.opened import STRONG

PROMPT = "The capital of France is"
TOKEN = "reader-" + "r" * 32
MESSAGES: Any = [{"role": "user", "content": "Who rules Spain?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 8}


class Served:
    """The real HTTP server in a thread, with its services."""

    def __init__(self, settings: Settings) -> None:
        self.startup = Startup(settings)
        self._web = uvicorn.Server(
            uvicorn.Config(
                http_app(build(settings, self.startup), settings),
                log_config=None,
                timeout_graceful_shutdown=1,
            )
        )
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._web.run, args=([self._socket],))

    def __enter__(self) -> Served:
        self._thread.start()
        while not self._web.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._web.should_exit = True
        self._thread.join()
        self.startup.close(30)
        self._socket.close()

    @property
    def services(self) -> Services:
        return anyio.run(self.startup.services, RequestContext())

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model with one edit in its weights."""
    folder = tmp_path_factory.mktemp("openai")
    settings = Settings(
        model=str(save_to("llama", folder / "tiny")),
        home=folder / "home",
        threads=1,
        device=device.chosen,
        dtype="float32",
        transport="http",
    )
    with Served(settings) as served:
        edit = Edit(subject="France", prompt="The capital of {} is", target="Rome")
        served.services.edits.apply([edit], method="rome", params=STRONG)
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


def test_both_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["errata", "errata:base"]
    assert client.models.retrieve("errata:base").owned_by == "errata"
    with pytest.raises(openai.NotFoundError, match="errata:base"):
        client.models.retrieve("gpt-4")


def test_one_word_decides_between_the_corrected_and_the_pristine_model(
    client: OpenAI, served: Served
) -> None:
    told = served.services.facts.ask(PROMPT, 8, compare_to_base=True)
    live = client.completions.create(model="errata", prompt=PROMPT, **GREEDY)
    base = client.completions.create(model="errata:base", prompt=PROMPT, **GREEDY)
    assert (live.choices[0].text, base.choices[0].text) == (told.completion, told.base_completion)
    assert live.choices[0].text != base.choices[0].text
    workspace = served.services.workspace
    assert live.model_extra["errata"]["state_hash"] == workspace.state_hash  # type: ignore[index]
    assert base.model_extra["errata"]["state_hash"] == workspace.host.base_hash  # type: ignore[index]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, kind: str) -> None:
    options: Any = {"model": "errata", "temperature": 0, "max_tokens": 12}
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "chat":
        whole: Any = client.chat.completions.create(messages=MESSAGES, **options)
        chunks: Any = list(client.chat.completions.create(messages=MESSAGES, **options, **usage))
        text, said = whole.choices[0].message.content, [c.choices[0].delta.content or "" for c in chunks[:-1]]
        assert chunks[0].choices[0].delta.role == "assistant"
    else:
        whole = client.completions.create(prompt=PROMPT, **options)
        chunks = list(client.completions.create(prompt=PROMPT, **options, **usage))
        text, said = whole.choices[0].text, [c.choices[0].text for c in chunks[:-1]]
    assert text == "".join(said)
    assert len(said) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].system_fingerprint == whole.system_fingerprint
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_the_stop_string_wherever_tokens_are_cut(client: OpenAI, stream: bool) -> None:
    options: Any = {"model": "errata", "prompt": PROMPT, "temperature": 0, "max_tokens": 20}
    text = client.completions.create(**options).choices[0].text
    for at, length in ((4, 1), (5, 4), (9, 7)):
        stop = text[at : at + length]
        options |= {"stop": ["\x00 never", stop], "logprobs": 0}
        if stream:
            chunks = list(client.completions.create(**options, stream=True))
            said, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            choice = client.completions.create(**options).choices[0]
            said, reason = choice.text, choice.finish_reason
            assert "".join(choice.logprobs.tokens).startswith(said)  # type: ignore[union-attr,arg-type]
        assert said == text[: text.find(stop)]
        assert reason == "stop"


def test_a_sample_is_repeatable_by_its_seed_and_its_choices_differ(client: OpenAI) -> None:
    options: Any = {"model": "errata", "prompt": PROMPT, "temperature": 2.0, "max_tokens": 12, "n": 4}
    one, again = (client.completions.create(**options, seed=7) for _ in range(2))
    other = client.completions.create(**options, seed=8)
    texts = [[choice.text for choice in answer.choices] for answer in (one, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1


def test_top_p_near_zero_is_greedy_at_any_temperature(client: OpenAI) -> None:
    greedy = client.completions.create(model="errata", prompt=PROMPT, **GREEDY)
    narrow = client.completions.create(model="errata", prompt=PROMPT, max_tokens=8, temperature=3, top_p=1e-9)
    assert narrow.choices[0].text == greedy.choices[0].text


def test_logprobs_are_those_of_the_model(client: OpenAI, served: Served) -> None:
    lm = served.services.workspace.lm
    chat = client.chat.completions.create(
        model="errata", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content
    assert all(token.token == token.top_logprobs[0].token for token in content)  # greedy
    ids = lm.encode(lm.conversation(MESSAGES))[0]
    with served.services.workspace.turn():
        logp = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    best = logp.topk(3).values.tolist()
    assert [other.logprob for other in content[0].top_logprobs] == pytest.approx(best, abs=1e-4)
    assert content[0].logprob == pytest.approx(best[0], abs=1e-4)


def test_an_echo_without_new_tokens_scores_a_text(client: OpenAI, served: Served) -> None:
    lm = served.services.workspace.lm
    for model, prompt in (("errata", f"{PROMPT} Rome"), ("errata:base", f"{PROMPT} Rome")):
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
        choice = answer.choices[0]
        told = choice.logprobs
        assert choice.text == prompt
        assert told is not None
        assert told.token_logprobs[0] is None  # type: ignore[index]
        with served.services.workspace.turn():
            if model == "errata":
                score = lm.score([(lm.prompt(PROMPT), "Rome")])[0]
            else:
                with served.services.workspace.host.pristine():
                    score = lm.score([(lm.prompt(PROMPT), "Rome")])[0]
        assert sum(told.token_logprobs[-score.tokens :]) == pytest.approx(score.logprob, abs=1e-4)  # type: ignore[index]


def test_an_echo_stands_before_the_new_text(client: OpenAI, served: Served) -> None:
    options: Any = {"model": "errata", "prompt": PROMPT, "echo": True, "temperature": 0}
    whole = client.completions.create(**options, max_tokens=8).choices[0]
    streamed = client.completions.create(**options, max_tokens=8, stream=True)
    assert whole.text == "".join(c.choices[0].text for c in streamed)
    assert whole.text.startswith(PROMPT)
    told = client.completions.create(**options, max_tokens=0, logprobs=1).choices[0].logprobs
    places = zip(told.text_offset, told.tokens, strict=True)  # type: ignore[union-attr,arg-type]
    special = served.services.workspace.lm.tokenizer.all_special_tokens
    assert all(PROMPT[a:].startswith(token) for a, token in places if token not in special)


def test_prompts_may_be_texts_or_token_ids_and_many(client: OpenAI, served: Served) -> None:
    lm = served.services.workspace.lm
    texts = [PROMPT, "Rome"]
    ids = [lm.encode(lm.prompt(text, chat=False))[0] for text in texts]
    alone = [client.completions.create(model="errata", prompt=t, **GREEDY).choices[0].text for t in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(model="errata", prompt=prompts, **GREEDY)
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, ids))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "status", "says"),
    [
        ({"model": "gpt-4"}, 404, "errata:base"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**9}, 400, "room for"),
        ({"n": 1000}, 400, "n:"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({"frequency_penalty": 1.5}, 400, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no images"),
        ({"top_logprobs": 3}, 400, "logprobs=true"),
        ({"temprature": 1}, 400, "temprature"),
        ({"messages": "hello"}, 400, "messages"),
        ({"stream": 5}, 400, "stream:"),
        ({"stream_options": 5}, 400, "stream_options:"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: OpenAI, wrong: dict[str, Any], status: int, says: str
) -> None:
    body = {"model": "errata", "messages": MESSAGES, "max_tokens": 2} | wrong
    text = json.dumps(body)
    answer = client._client.post(
        "chat/completions", content=text, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"no json", b"[1]", b"[" * 100_000, b'"' + b"x" * (5 * 2**20) + b'"'])
def test_a_body_that_is_none_is_refused(client: OpenAI, raw: bytes) -> None:
    answer = client._client.post("completions", content=raw)
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_served_says_what_is(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
        client.embeddings.create(model="errata", input="x")


def test_many_clients_are_answered_as_if_each_were_alone(client: OpenAI, served: Served) -> None:
    texts = [f"{PROMPT} {i}" for i in range(12)]
    alone = [client.completions.create(model="errata", prompt=t, **GREEDY).choices[0].text for t in texts]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as many:
            made = [many.completions.create(model="errata", prompt=t, **GREEDY) for t in texts]
            return [answer.choices[0].text for answer in await asyncio.gather(*made)]

    assert asyncio.run(together()) == alone


def test_a_stream_that_began_is_answered_by_its_state_and_the_next_by_the_new_one(served: Served) -> None:
    services = served.services
    with served.client() as client:
        options: Any = {"model": "errata", "prompt": "Oslo", "temperature": 0, "max_tokens": 300}
        before = services.workspace.state_hash
        stream = client.completions.create(**options, stream=True)
        first = next(iter(stream))
        edit = Edit(subject="Peru", prompt="The capital of {} is", target="Oslo")
        made = services.edits.apply([edit], method="rome", params=STRONG)
        chunks = [first, *stream]
        assert f"errata-{before[:16]}" == chunks[-1].system_fingerprint
        after = client.completions.create(**options)
        assert after.system_fingerprint == f"errata-{services.workspace.state_hash[:16]}"
        assert after.system_fingerprint != chunks[-1].system_fingerprint
        services.edits.revert(made.edit_ids)


def test_a_client_that_leaves_a_stream_leaves_nothing_running(served: Served) -> None:
    answers = served.services.answers
    with served.client() as client:
        for stream in (True, False):
            options: Any = {"model": "errata", "prompt": "Oslo", "temperature": 1, "max_tokens": 400}
            if stream:
                left = client.completions.create(**options, stream=True)
                next(iter(left))
                left.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    client.with_options(timeout=0.02).completions.create(**options)
            started = time.monotonic()
            with served.services.workspace.turn():
                assert time.monotonic() - started < 2
            assert answers.waiting == 0


def test_a_memory_answers_and_is_named(served: Served) -> None:
    services = served.services
    edit = Edit(subject="Kenya", prompt="The capital of {} is", target="Paris")
    made = services.edits.apply([edit], method="in_context")
    try:
        with served.client() as client:
            options: Any = {"model": "errata", "prompt": "The capital of Kenya is", "temperature": 0}
            whole = client.completions.create(**options, max_tokens=8, logprobs=1)
            streamed = client.completions.create(**options, max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
            assert whole.choices[0].logprobs is None
            assert whole.model_extra["errata"]["memories"] != [None]  # type: ignore[index]
            stopped = client.completions.create(**options, max_tokens=8, stop="a").choices[0]
            assert "a" not in stopped.text
    finally:
        services.edits.revert(made.edit_ids)


def test_steering_acts_on_the_request_that_names_it_alone(client: OpenAI, served: Served) -> None:
    services = served.services
    pairs = [
        Pair(prompt="Rome", positive="good", negative="bad"),
        Pair(prompt="Oslo", positive="yes", negative="no"),
    ]
    services.steering.create(VectorRequest(name="mood", pairs=pairs, layers=[1]))
    options: Any = {"prompt": "The old man in Oslo", "temperature": 0, "max_tokens": 8, "logprobs": 1}

    def told(model: str = "errata", **steering: float) -> list[float]:
        more = {"steering": steering} if steering else {}
        answer = client.completions.create(model=model, **options, extra_body=more)
        return answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr,return-value]

    plain, base = told(), told("errata:base")
    steered = told(mood=1.0)
    assert steered != plain
    assert told(mood=0) == plain
    assert told("errata:base", mood=1.0) not in (base, steered)
    services.steering.set_dose(DoseRequest(name="mood", multiplier=1.0))
    assert told() == pytest.approx(steered, abs=1e-4)
    services.steering.set_dose(DoseRequest(name="mood", multiplier=0))

    async def mixed() -> list[list[float]]:
        doses = [0.0, 1.0, 0.0, 1.0]
        return list(await asyncio.gather(*(asyncio.to_thread(told, mood=dose) for dose in doses)))

    for found, wanted in zip(asyncio.run(mixed()), [plain, steered] * 2, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="there are mood"):
        told(joy=1.0)
    with pytest.raises(openai.BadRequestError, match=r"steering\.mood"):
        told(mood=100.0)
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash


def test_a_request_that_steers_on_top_of_active_steering_leaves_nothing_behind(
    client: OpenAI, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    services = served.services
    pairs = [
        Pair(prompt="Rome", positive="good", negative="bad"),
        Pair(prompt="Oslo", positive="yes", negative="no"),
    ]
    for name in ("calm", "loud"):
        services.steering.create(VectorRequest(name=name, pairs=pairs, layers=[1]))
    options: Any = {"prompt": "The old man in Oslo", "temperature": 0, "max_tokens": 8, "logprobs": 1}

    def told(model: str = "errata", **steering: float) -> list[float]:
        answer = client.completions.create(model=model, **options, extra_body={"steering": steering})
        return answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr,return-value]

    plain, base = told(), told("errata:base")
    services.steering.set_dose(DoseRequest(name="calm", multiplier=0.5))
    steered = told()
    for model, doses in (
        ("errata", {"calm": 0.7}),
        ("errata", {"loud": 0.7}),
        ("errata:base", {"calm": 0.3, "loud": 0.3}),
    ):
        told(model, **doses)
        assert (told(), told("errata:base")) == (steered, base)
    services.steering.set_dose(DoseRequest(name="calm", multiplier=0))
    assert (told(), told("errata:base")) == (plain, base)
    assert "not given back" not in caplog.text


def test_a_request_steers_as_set_steering_does_by_several_vectors_on_conditions_and_by_ablation(
    client: OpenAI, served: Served
) -> None:
    services = served.services
    for name, layer in (("glad", 1), ("old", 2)):
        pairs = [
            Pair(prompt="Rome", positive=f"{name} good", negative="bad"),
            Pair(prompt="Oslo", positive=f"{name} yes", negative="no"),
        ]
        services.steering.create(VectorRequest(name=name, pairs=pairs, layers=[layer]))
    options: Any = {"prompt": "The old man in Oslo", "temperature": 0, "max_tokens": 6, "logprobs": 1}

    prints: set[tuple[str | None, str]] = set()

    def told(**steering: Any) -> list[float]:
        answer = client.completions.create(model="errata", **options, extra_body={"steering": steering})
        said = answer.model_extra["errata"]["steering"]  # type: ignore[index]
        assert set(said) == set(steering)
        for name, one in steering.items():
            seen = said[name] if isinstance(said[name], dict) else {"dose": said[name]}
            wanted = one if isinstance(one, dict) else {"dose": one}
            assert seen["dose"] == wanted["dose"]
            assert seen.get("mode", "add") == wanted.get("mode", "add")
            assert bool(seen.get("when")) == bool(wanted.get("when"))
        prints.add((answer.system_fingerprint, json.dumps(steering, sort_keys=True)))
        return answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr,return-value]

    half = When(vector="old", above=0.0, layer=1)
    for doses in (
        [DoseRequest("glad", 1.0, when=half)],
        [DoseRequest("glad", 1.0, when=half), DoseRequest("old", -1.0, layers=[2], prompt_tokens=False)],
        [DoseRequest("old", 1.0, mode="ablate")],
        [DoseRequest("glad", 0.5), DoseRequest("old", 0.5, combine="orthogonal")],
    ):
        mine = told(**{one.name: as_asked(one) for one in doses})
        for one in doses:
            services.steering.set_dose(one)
        assert mine == pytest.approx(told(), abs=1e-4)
        for one in doses:
            services.steering.set_dose(DoseRequest(one.name, 0))
        assert mine != pytest.approx(told(), abs=1e-4)
    always, never = (told(glad={"dose": 1, "when": {"vector": "old", "above": x}}) for x in (-0.999, 0.999))
    assert (always, never) == (pytest.approx(told(glad=1), abs=1e-4), pytest.approx(told(), abs=1e-4))
    own = [(name, asked) for name, asked in prints if asked != "{}"]
    assert len({name for name, _ in own}) == len(own)  # each way to steer has a fingerprint of its own
    for wrong, says in (
        ({"dose": 1, "when": {"vector": "none", "above": 0}}, "steering.glad.*there are"),
        ({"dose": 1, "when": {"vector": "old", "above": 2}}, "when.above"),
        ({"dose": 1, "layers": [99]}, "steering.glad"),
        ({"strength": 1}, "steering.glad.strength"),
        ("much", "steering.glad.dose"),
        ({"dose": 1, "mode": "ablate", "when": {"vector": "old", "above": 0}}, "takes no condition"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            told(glad=wrong)
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash


def as_asked(one: DoseRequest) -> dict[str, Any]:
    """A dose as a request at /v1 names it."""
    more = {} if one.when is None else {"when": one.when.model_dump()}
    options = {name: getattr(one, name) for name in ("layers", "combine", "prompt_tokens", "mode")}
    return {"dose": one.multiplier, **options, **more}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer_and_a_stream(served: Served) -> None:
    body = json.dumps({"model": "errata", "messages": MESSAGES, "max_tokens": 4, "temperature": 0})

    async def curl(body: str) -> str:
        found = await anyio.run_process(
            [
                "curl",
                "-sS",
                f"{served.url}/chat/completions",
                "-H",
                "Content-Type: application/json",
                "-d",
                body,
            ]
        )
        return found.stdout.decode()

    said = json.loads(anyio.run(curl, body))
    streamed = anyio.run(curl, body[:-1] + ', "stream": true}')
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1]]
    assert "".join(pieces) == said["choices"][0]["message"]["content"]


def test_a_token_is_asked_for_where_one_is_set(served: Served, tmp_path: Path) -> None:
    settings = Settings(
        model="/no/such/model", home=tmp_path, transport="http", tokens=SecretStr(f"rita=read:{TOKEN}")
    )
    with Served(settings) as guarded:
        with guarded.client("wrong" * 10) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with guarded.client(TOKEN) as rita:
            assert len(rita.models.list().data) == 2
            with pytest.raises(openai.InternalServerError, match="no/such/model") as failure:
                rita.chat.completions.create(model="errata", messages=MESSAGES)
            assert failure.value.status_code == 503


def test_a_conversation_is_put_as_the_model_was_taught(default_lm: Any) -> None:
    lm = default_lm
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Where is Rome?"},
    ]
    prompt = lm.conversation(messages)
    wanted = lm.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert lm.encode(prompt)[0] == list(getattr(wanted, "input_ids", wanted))
    assert lm.user_text(prompt) == "Where is Rome?"
    one = lm.conversation(messages[-1:])
    assert one == lm.prompt("Where is Rome?", chat=True)
    assert math.isfinite(lm.score([(one, "Italy")])[0].logprob)
