"""From `--model` to a loaded model: the embedded default, a hub id, a directory or a GGUF file.

Weights are read only from safetensors, and code of a model is never run. On CPU, in the stored type,
the parameters are views of the mapped file: they load in a fraction of a second and are in memory once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import ModelUnavailable
from server.models import conversion, default_model, devices, quantisation

if TYPE_CHECKING:
    from editors.model.lm import LM
    from server.settings import Settings

Progress = Callable[[float, float, str], None]  # (done, total, message), as Call.progress
BFLOAT16 = "bfloat16"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(settings: Settings, progress: Progress) -> LM:
    """The model of `settings.model`, ready to run: eval mode, no gradients, on its device.

    Takes about a second and the import of torch; a conversion, needed once, takes half a minute.
    Raises ModelUnavailable with what was wrong and what to do.
    """
    progress(0.0, 1.0, "starting torch")
    import torch

    torch.set_num_threads(devices.thread_count(settings))
    device = devices.choose_device(settings.device)
    path = resolve(settings, progress)
    progress(0.8, 1.0, f"loading {path.name}")
    model, tokenizer = _from_directory(path, settings, device)
    from editors.errors import EditError
    from editors.model.lm import LM

    try:
        loaded = LM(model, tokenizer, display_name(settings.model))
    except EditError as error:  # a family, or a tokenizer, that cannot be edited
        raise ModelUnavailable(f"{path}: {error}") from error
    progress(1.0, 1.0, "ready")
    return loaded


def weights_in(settings: Settings, dtype: Any) -> dict[str, Any]:
    """The weights of the model's files in another precision, by name, on the CPU.

    Weights that are stored in it are views of the mapped file. Raises ModelUnavailable.
    """
    import torch

    def quiet(_done: float, _total: float, _message: str) -> None:
        return None

    other = settings.model_copy(update={"dtype": str(dtype).removeprefix("torch."), "device": "cpu"})
    path = resolve(other, quiet)
    model, _ = _from_directory(path, other, torch.device("cpu"))
    return {name: p.data for name, p in model.named_parameters()}


def display_name(model: str) -> str:
    """The name to show for a model: its hub id, or the last part of its path."""
    if model == "default":
        return default_model.NAME
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def resolve(settings: Settings, progress: Progress) -> Path:
    """The directory to load from. Converts or downloads the model first if needed."""
    model, path = settings.model, Path(settings.model).expanduser()
    if model == "default":
        target = default_model.folder(settings.models_dir)
        return converted(None, target, progress)
    if path.is_dir():
        return path
    if path.is_file():
        return _from_file(path, settings, progress)
    if _looks_like_path(model):
        raise ModelUnavailable(
            f"model {model!r} does not exist (looked at {path.absolute()}); check the path"
        )
    return _from_hub(model, progress)


def source_gguf(settings: Settings, loaded: Path) -> Path | None:
    """The GGUF file that the folder `loaded` was converted from; None where there is none, or where it is gone."""
    given = Path(settings.model).expanduser()
    source = default_model.installed_file() if settings.model == "default" else given.absolute()
    if source is None or not source.is_file():
        return None
    return source if conversion.sha256(source) == conversion.source_sha256(loaded) else None


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "~", "/")) or model.count("/") > 1 or "\\" in model or model.endswith(".gguf")
    )


def _from_file(path: Path, settings: Settings, progress: Progress) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnavailable(
                f"{path} is not a GGUF file; give a .gguf file, a directory with config.json and "
                "*.safetensors, or a hub id"
            )
    progress(0.05, 1.0, f"hashing {path.name}")
    target = settings.models_dir / f"{path.stem}-{conversion.sha256(path)[:16]}"
    if settings.dtype == BFLOAT16 and not conversion.is_complete(target):
        return converted(path.absolute(), target.with_name(f"{target.name}-{BFLOAT16}"), progress, BFLOAT16)
    return converted(path.absolute(), target, progress)


def converted(source: Path | None, target: Path, progress: Progress, dtype: str = "float32") -> Path:
    """`target`, after a separate process has converted the model if needed, to weights of this type."""
    if conversion.is_complete(target):
        return target
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(  # -P: do not search the current folder for modules
        [
            sys.executable,
            "-P",
            "-m",
            "server.models.conversion",
            str(source or "default"),
            str(target),
            dtype,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
    )
    with process:
        problem = _follow(process, progress)
    if problem or not conversion.is_complete(target):
        what = source.name if source else "the default model"
        raise ModelUnavailable(f"{what} could not be converted: {problem or 'it ended without a message'}")
    return target


def _follow(process: subprocess.Popen[str], progress: Progress) -> str | None:
    """Pass on the progress of the conversion process; returns why it failed, or None."""
    noise: deque[str] = deque(maxlen=3)
    problem = None
    assert process.stdout is not None
    for line in process.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):  # a warning of some library
            noise.append(line.strip())
        elif "error" in message:
            problem = str(message["error"])
        elif "done" in message:
            progress(0.75 * message["done"], 1.0, f"preparing the model (once): {message['message']}")
    code = process.wait()
    if problem is None and code:
        out_of_memory = " (killed; out of memory?)" if code in (-9, 137) else ""
        problem = f"exit code {code}{out_of_memory}: {' | '.join(noise)}"
    return problem


def _from_hub(model: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(0.1, 1.0, f"fetching {model} from the hub")
    try:
        folder = snapshot_download(
            model, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*", "*.bin.index.json"]
        )
    except HFValidationError as error:
        raise ModelUnavailable(
            f"model {model!r} is neither a file or directory here nor a hub id such as 'org/name'"
        ) from error
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{model!r} is gated: accept its terms on its page, then set HF_TOKEN to a token of yours"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"there is no model {model!r} on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(_unreachable(model)) from error
    except Exception as error:  # connection errors differ by HTTP library and version
        raise ModelUnavailable(f"{_unreachable(model)} ({type(error).__name__}: {error})") from error
    return Path(folder)


def _unreachable(model: str) -> str:
    return (
        f"the hub cannot be reached for {model!r}, and it is not in the local cache. Offline? "
        "Pass --model with a directory or a .gguf file, or use the default model"
    )


def _from_directory(path: Path, settings: Settings, device: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face model directory."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from editors.model.loading import LOADING

    logging.disable_progress_bar()
    try:
        kind, config = _model_class(path)
        dtype = devices.choose_dtype(settings.dtype, device)
        quantised = quantisation.config_for(path, config, settings.quantize, dtype)
        with LOADING:
            place = _placement(kind, config, dtype, settings, device)
            model, report = kind.from_pretrained(
                path,
                dtype=dtype,
                device_map=place,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **quantised,
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelUnavailable(f"{path} could not be loaded: {error}") from error
    if absent := sorted(report["missing_keys"]):
        raise ModelUnavailable(
            f"{path} is not a whole language model: {len(absent)} weights are missing, such as {absent[0]!r}"
        )
    return model.eval().requires_grad_(False), tokenizer


def _model_class(path: Path) -> tuple[Any, Any]:
    """The auto class that fits the directory, and its config; refuses what cannot be edited."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        what = "holds a PEFT adapter, not a model" if adapter else "has no config.json"
        raise ModelUnavailable(
            f"{path} {what}; give the directory of a whole model, as save_pretrained writes it"
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        why = " only pickled ones, which can run code when read;" if pickled else ""
        raise ModelUnavailable(
            f"{path} has no *.safetensors weights,{why} save it with a current save_pretrained first"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    kind: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    if config is not config.get_text_config():  # a language model that also reads images, loaded whole
        kind = AutoModelForImageTextToText
    if type(config) not in kind._model_mapping:
        raise ModelUnavailable(
            f"{path} holds a {config.model_type!r} model, which does not generate text; use a language model"
        )
    return kind, config


def _placement(kind: Any, config: Any, dtype: Any, settings: Settings, device: Any) -> Any:
    """The device, or "auto" (accelerate spreads the model over all GPUs) if it does not fit on the device."""
    if device.type != "cuda":
        return device
    import torch

    with torch.device("meta"):
        size = sum(p.numel() for p in kind.from_config(config).parameters()) * dtype.itemsize
    if quantisation.is_quantised(config, settings.quantize):
        size //= 2  # at most: the embeddings stay in `dtype`
    if devices.fits(size, device):
        return device
    together = devices.fits(size, *devices.gpus())
    if settings.device == "auto" and together:
        return "auto"
    where, ways = settings.device, ["--dtype bfloat16"] if dtype.itemsize > 2 else []
    if settings.device == "auto":
        where = "all GPUs together"
    elif together:
        ways.insert(0, "--device auto, which spreads them over all GPUs")
    raise ModelUnavailable(
        f"the weights take {size / 1e9:.1f} GB, which leaves no room to work on {where}; "
        f"use {', '.join([*ways, '--device cpu'])} or a smaller model"
    )
