"""Engines as fakes: real HTTP, a real tiny model behind it, the payloads of the real ones, and sabotage by name."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from editors.model.deltas import Delta, Dense, LowRank
from editors.model.lm import LM
from server.engines.artefacts import load_adapter
from server.engines.probes import references
from tests.families import fresh

Deltas = dict[str, list[Delta]]


class Refuse(Exception):
    """Answer with this status and text."""

    def __init__(self, status: int, text: str = "refused") -> None:
        super().__init__(text)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # as many as ask at once wait here; the default of 5 resets the others


class FakeEngine:
    """A server with a tiny model. `sabotage` names what it does wrong."""

    def __init__(self, family: str = "llama") -> None:
        self.lm: LM = fresh(family)
        self.sabotage = ""
        self.calls: list[str] = []
        self.deltas: dict[str, Deltas] = {}  # by name of the adapter
        self.cached: dict[str, Any] = {}
        self._said: dict[Any, tuple[dict[int, float], tuple[int, ...], list[float]]] = {}
        self.answered = 0
        self.scratch = ""
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self._alive = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        if self._alive:
            self._alive = False
            self._server.shutdown()
            self._server.server_close()

    def die(self) -> None:
        """Refuse connections from now on."""
        threading.Thread(target=self.close).start()
        while self._alive:
            pass

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_DELETE(self) -> None:
                self._read()

            def do_POST(self) -> None:
                self._read()

            def _read(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                try:
                    self._answer(json.loads(data) if data else {})
                except (ValueError, UnicodeDecodeError):
                    self._answer(data)

            def _answer(self, body: Any) -> None:
                try:
                    with fake._lock:
                        fake.calls.append(self.path)
                        said = fake.answer(self.path, body)
                    status, text = 200, said if isinstance(said, str) else json.dumps(said)
                except Refuse as refusal:
                    status, text = refusal.status, str(refusal)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, path: str, body: Any) -> Any:
        """The answer to one call."""
        raise NotImplementedError

    # --- what the model says -------------------------------------------------------------------

    def load(self, name: str, folder: str) -> None:
        """Take a PEFT adapter, or do what the sabotage says."""
        self.take(name, load_adapter(self.lm, Path(folder)))

    def take(self, name: str, loaded: Deltas) -> None:
        """Take an adapter, or do what the sabotage says."""
        former = self.deltas.get(name)
        changed: Mapping[str, Callable[[], Deltas | None]] = {
            "ignored": lambda: {},
            "stale": lambda: former if former is not None else {},
            "half": lambda: scaled(loaded, 0.5),
            "negative": lambda: scaled(loaded, -1),
            "strong": lambda: scaled(loaded, 1.2),
            "double": lambda: scaled(loaded, 2),
            "scale_0": lambda: scaled(loaded, 0),
            "wrong_adapter": lambda: another(loaded),
            "on_top": lambda: {n: [*(former or {}).get(n, []), *ds] for n, ds in loaded.items()},
            "rank_cut": lambda: {
                n: [LowRank(d.left[:, :1], d.right[:1]) for d in ds] for n, ds in low(loaded)
            },  # type: ignore[union-attr]
            "wrong_layer": lambda: {self._neighbour(n): ds for n, ds in loaded.items()},
        }
        taken = changed.get(self.sabotage, lambda: loaded)()
        self.deltas[name] = taken if taken is not None else {}

    def _tuned(self) -> Deltas:
        """What makes this another model: all that its layers write is a little different."""
        made = torch.Generator().manual_seed(1)
        names = [self.lm.mlp_out(layer) for layer in range(self.lm.n_layers)]
        shapes = {name: tuple(self.lm.weight(name).shape) for name in names}
        return {name: [Dense(0.5 * torch.randn(shape, generator=made))] for name, shape in shapes.items()}

    def _neighbour(self, name: str) -> str:
        names = [self.lm.mlp_out(layer) for layer in range(self.lm.n_layers)]
        return names[(names.index(name) + 1) % len(names)]

    def said(self, ids: list[int], deltas: Deltas) -> tuple[dict[int, float], tuple[int, ...], list[float]]:
        """First token's log-probabilities, the greedy answer, and the log-probability of each of its tokens."""
        self.answered += 1
        if self.sabotage == "one_of_two_replicas" and self.answered % 2:
            deltas = {}
        if self.sabotage == "restarted" and self.answered > 4:
            deltas = {}
        if self.sabotage == "other_model":
            deltas = {**deltas, **self._tuned()}
        if self.sabotage == "other_prompt":
            ids = ids[:-1] or ids
        top, answer, scores = self._known(tuple(ids), deltas)
        if self.sabotage == "noise":
            top = {token: value + (0.02 if n % 2 else -0.02) for n, (token, value) in enumerate(top.items())}
        return top, answer, scores

    def _known(
        self, ids: tuple[int, ...], deltas: Deltas
    ) -> tuple[dict[int, float], tuple[int, ...], list[float]]:
        """What the model says with these changes; asked once, for engines are asked the same again and again."""
        parts = [(n, *(p.numpy().tobytes() for p in _tensors(d))) for n, ds in deltas.items() for d in ds]
        key = (ids, tuple(parts))
        if key not in self._said:
            with self.lm.patched(deltas):
                one = references(self.lm, [list(ids)])[0]
            self._said[key] = (dict(one.top), one.answer, list(one.scores))
        top, answer, scores = self._said[key]
        return dict(top), answer, list(scores)


def _tensors(delta: Delta) -> tuple[torch.Tensor, ...]:
    return (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.delta,)


def low(deltas: Deltas) -> list[tuple[str, list[Delta]]]:
    return list(deltas.items())


def scaled(deltas: Deltas, by: float) -> Deltas:
    return {
        n: [LowRank(d.left * by, d.right) for d in ds if isinstance(d, LowRank)] for n, ds in deltas.items()
    }


def another(deltas: Deltas) -> Deltas:
    """An adapter of the same shapes and sizes that was made for something else."""
    made = torch.Generator().manual_seed(2)
    return {
        n: [
            LowRank(d.left[torch.randperm(len(d.left), generator=made)], d.right)
            for d in ds
            if isinstance(d, LowRank)
        ]
        for n, ds in deltas.items()
    }


class FakeVllm(FakeEngine):
    """vLLM, with the adapter endpoints and those of its development mode."""

    base_name = "tiny"

    def __init__(self, family: str = "llama") -> None:
        super().__init__(family)
        self.weights: Deltas = {}
        self.broken = self.paused = self.dead = False
        self.asked = 0

    def answer(self, path: str, body: Any) -> Any:
        if path == "/health":
            return ""
        known: Mapping[str, Callable[[Any], Any]] = {
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": lambda b: self.deltas.pop(b["lora_name"], None) and "ok",
            "/v1/completions": self._complete,
            "/pause": lambda _: self._pause(True),
            "/resume": lambda _: self._pause(False),
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda _: self.cached.clear() or "",
            "/update_weight_version": lambda _: {},
        }
        if path not in known:
            raise Refuse(404)
        return known[path](body)

    def _pause(self, on: bool) -> str:
        self.paused = on
        self.dead = self.dead or (self.broken and not on)  # what waits is asked of weights without values
        return "{}"

    def _load(self, body: Any) -> str:
        assert body["load_inplace"] is True
        if self.sabotage == "status_500":
            raise Refuse(500, "Internal Server Error")
        if self.sabotage == "500_then_dead":
            self._stop_after()
            raise Refuse(500, "EngineDeadError")
        if not Path(body["lora_path"]).is_dir():
            raise Refuse(404, "No adapter found")
        self.load(body["lora_name"], body["lora_path"])
        self.asked = 0
        if self.sabotage == "dead":
            self._stop_after()
        return f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def _stop_after(self) -> None:
        self.sabotage = "closed"

    def _reload(self, body: Any) -> Any:
        """Load what tensors the folder has; leave everything broken when there is none, as the real one does."""
        folder = Path(body["kwargs"]["weights_path"])
        assert body["method"] == "reload_weights"
        if not self.paused:
            return {"results": [None]}  # what runs goes on with what is cached
        if self.sabotage == "status_500" and not (folder / "base").exists():
            self.broken = True
            raise Refuse(500, "Internal Server Error")
        if not (folder / "model.safetensors").is_file():
            self.broken = True
            raise Refuse(500, "Internal Server Error")
        self.broken = False
        if self.sabotage == "ignored":
            return {"results": [None]}
        loaded = safetensors.torch.load_file(folder / "model.safetensors")
        for name, tensor in loaded.items():
            if name not in dict(self.lm.model.named_parameters()):
                continue
            pristine = self.lm.model.get_parameter(name).data
            if self.sabotage == "half":
                tensor = pristine + (tensor - pristine) / 2
            self.weights[name] = [Dense(tensor - pristine)]
        return {"results": [None]}

    def _complete(self, body: Any) -> Any:
        self.asked += 1
        if self.sabotage == "closed":
            raise Refuse(500, "EngineCore encountered an issue")
        if body["model"] != self.base_name and body["model"] not in self.deltas:
            raise Refuse(404, f"The model `{body['model']}` does not exist.")
        assert body["cache_salt"]
        deltas = {**self.weights, **self.deltas.get(body["model"], {})}
        self.dead = self.dead or self.broken
        if self.dead:
            raise Refuse(500, "EngineCore encountered an issue")
        if self.sabotage == "forgets" and self.asked > 4:
            deltas = {}
        ids: list[int] = body["prompt"]
        assert not body.get("echo")  # the real one dies of it, with an adapter and two requests at once
        key = json.dumps(ids)
        if self.sabotage == "cached" and key in self.cached:
            return self.cached[key]
        top, answer, scores = self.said(ids, deltas)
        if self.sabotage == "scores_of_base":
            base = self.said(ids, {})[2]
            scores = [*base, *scores[len(base) :]][: len(scores)]
        self.cached[key] = found = self._shaped(body, ids, top, answer, scores)
        return found

    def _shaped(
        self, body: Any, ids: list[int], top: dict[int, float], answer: tuple[int, ...], scores: list[float]
    ) -> Any:
        wrong: Mapping[str, Any] = {
            "no_logprobs": {"choices": [{"text": "x", "logprobs": None}]},
            "no_choices": {"choices": []},
            "error_with_200": {"error": {"message": "out of memory"}},
            "html": "<html>Bad gateway</html>",
            "list": [1, 2],
        }
        if self.sabotage in wrong:
            return wrong[self.sabotage]
        tokens, values = list(answer) or [0], scores or [0.0]
        best = sorted(top.items(), key=lambda item: -item[1])[: body["logprobs"]]
        first = self._twisted({f"token_id:{token}": value for token, value in best})
        later = [{f"token_id:{token}": value} for token, value in zip(tokens, values, strict=True)]
        tops = [first, *later[1:]]
        if self.sabotage == "cut_short":
            tokens, values, tops = tokens[:1], values[:1], tops[:1]
        logprobs = {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": values,
            "top_logprobs": tops,
        }
        return {"choices": [{"text": self.lm.tokenizer.decode(list(answer)), "logprobs": logprobs}]}

    def _twisted(self, told: dict[str, float]) -> dict[str, float]:
        if self.sabotage == "nan":
            return dict.fromkeys(told, math.nan)
        if self.sabotage == "infinite":
            return dict.fromkeys(told, -math.inf)
        if self.sabotage == "constant":
            return {"token_id:5": -0.1, "token_id:6": -3.0}
        if self.sabotage == "none_told":
            return {}
        if self.sabotage == "swapped":
            return dict(zip(told, reversed(list(told.values())), strict=True))
        return told


class FakeSgLang(FakeEngine):
    """SGLang."""

    def __init__(self, family: str = "llama") -> None:
        super().__init__(family)
        self.weights: Deltas = {}
        self.paused = False

    def answer(self, path: str, body: Any) -> Any:
        if path in ("/health", "/flush_cache"):
            return ""
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
            return {}
        if path == "/unload_lora_adapter":
            if self.deltas.pop(body["lora_name"], None) is None:
                raise Refuse(400, "no such adapter")
            return {"success": True}
        if path == "/load_lora_adapter":
            return self._load(body)
        if path == "/update_weights_from_disk":
            return self._update(body)
        if path == "/generate":
            return self._generate(body)
        raise Refuse(404)

    def _load(self, body: Any) -> Any:
        if self.sabotage == "unsuccessful":
            return {"success": False, "error_message": "LoRA adapter is not compatible"}
        if body["lora_name"] in self.deltas:
            raise Refuse(400, "loaded already")
        self.load(body["lora_name"], body["lora_path"])
        return {"success": True}

    def _update(self, body: Any) -> Any:
        assert self.paused
        if self.sabotage == "unsuccessful":
            return {"success": False, "message": "Failed to update weights"}
        if self.sabotage == "ignored":
            return {"success": True, "message": "Succeeded to update model weights."}
        loaded = safetensors.torch.load_file(Path(body["model_path"]) / "model.safetensors")
        own = dict(self.lm.model.named_parameters())
        self.weights = {
            n: [Dense(t - own[n].data)] for n, t in loaded.items() if n in own and not same(t, own[n])
        }
        return {"success": True, "message": "Succeeded to update model weights."}

    def _generate(self, body: Any) -> Any:
        name = body.get("lora_path")
        if name is not None and name not in self.deltas:
            raise Refuse(400, "the adapter is not loaded")
        ids = body["input_ids"]
        top, answer, scores = self.said(ids, {**self.weights, **(self.deltas.get(name, {}) if name else {})})
        best = sorted(top.items(), key=lambda item: -item[1])[: body["top_logprobs_num"]]
        answer, scores = (answer, scores) if answer else ((0,), [0.0])
        later = [[[value, token, ""]] for token, value in zip(answer, scores, strict=True)]
        told: dict[str, Any] = {
            "output_token_logprobs": [
                [value, token, ""] for token, value in zip(answer, scores, strict=True)
            ],
            "output_top_logprobs": [[[value, token, ""] for token, value in best], *later[1:]],
        }
        return {"text": "", "meta_info": told}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other.data)


class FakeHub:
    """A hub whose repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.sabotage, self.private = root, "", None

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private
        (self.root / repo).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, delete_patterns: str
    ) -> None:
        if self.sabotage == "refused":
            raise OSError("403 Forbidden")
        for file in Path(folder_path).iterdir():
            data = file.read_bytes()
            if self.sabotage == "cut" and file.suffix == ".safetensors":
                data = data[:-100]
            (self.root / repo_id / file.name).write_bytes(data)

    def snapshot_download(self, repo: str, *, local_dir: str) -> str:
        for file in (self.root / repo).iterdir():
            (Path(local_dir) / file.name).write_bytes(file.read_bytes())
        return local_dir
