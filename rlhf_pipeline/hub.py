"""Open models and tokenizers from a folder or the Hugging Face hub, with errors that say what to do."""

import difflib
import json
import math
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.files import disk_error
from rlhf_pipeline.terminal import LOGIN

PATIENCE = 5.0  # seconds to wait for the hub's answer
_MOST_PARTS = 10_000  # layers, labels, heads or experts of a model
_FIX = (
    "check the name, or give a local path; if it is private or gated, set HF_TOKEN; behind a firewall set HF_ENDPOINT "
    "to a mirror; with no network run the offline demo: make demo"
)


@contextmanager
def explain_failures(what: str, setting: str) -> Iterator[None]:
    """Turn any failure to open a path or hub id into a one-line UserError.

    If there is no such file or folder, the hub is used. If the hub does not answer, the local cache is used.
    """
    here = _is_local(what)
    silence = None if here else hub_silence()
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # a reader may raise anything on a malformed file
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of tokenizers (Rust)
            raise
        from huggingface_hub import constants

        if fault := disk_error(error, Path(constants.HF_HOME)):
            raise fault from error
        failure = f"is not in the cache ({constants.HF_HOME}), and {silence}" if silence else "could not be opened"
        fix = "if a file in it is damaged, restore it, or give another" if here else _FIX
        raise UserError(f"{setting}={what} {failure} ({reason_of(error, 250)}); {fix}.") from error


def reason_of(error: BaseException, length: int) -> str:
    """Return an exception's message in one line of at most `length` characters, without logins and tokens."""
    from huggingface_hub import get_token

    text = LOGIN.sub("://", str(error))
    password = _login().rstrip("@").rpartition(":")[2]
    for secret in (_login(), get_token(), password, unquote(password)):
        if secret and len(secret) > 3:
            text = text.replace(secret, "***")
    text = re.sub(r"(?i)\b(bearer|basic) \S+", r"\1 ***", text)
    return textwrap.shorten(text, length) or type(error).__name__


def endpoint() -> str:
    """Return the hub's address without the user and password that HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    return constants.ENDPOINT.replace(_login(), "")


def _login() -> str:
    """Return `user:password@` if HF_ENDPOINT begins with it, else an empty string."""
    from huggingface_hub import constants

    found = re.match(r"(?:\w+://)?([^/?#]*@)", constants.ENDPOINT)
    return found[1] if found else ""


@cache
def hub_silence() -> str | None:
    """Return why the hub cannot be used, or None if it answers.

    The client itself tries each file five times, which takes a minute. So if the hub does not answer, this process and
    its children go offline and use only the cache.
    """
    from huggingface_hub import constants

    silence = why_unreachable()
    if silence and not constants.is_offline_mode():
        print(f"{silence}; only the cache ({constants.HF_HOME}) is used.", flush=True)
        constants.HF_HUB_OFFLINE = True  # huggingface_hub and transformers read this
        os.environ["HF_HUB_OFFLINE"] = "1"  # peft and child processes read this
        if "datasets" in sys.modules:  # it copied the old value at import
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return silence


@cache
def why_unreachable() -> str | None:
    """Return why the hub cannot be used, or None if it sends an HTTP status below 500 within `PATIENCE`.

    The request runs in a thread, because the client's timeout is per address of a host and excludes the DNS lookup.
    """
    from huggingface_hub import constants, get_session  # same proxies and certificates as downloads

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the hub is not used"
    found: list[str] = []

    def ask() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=2 * PATIENCE, follow_redirects=False)
            failing = answer.status_code >= 500  # the client would try each file five times
            found.append(f"it answers {answer.status_code} {answer.reason_phrase}" if failing else "")
        except Exception as error:  # from httpx, httpx2, ssl or socket, depending on the client
            found.append(reason_of(error, 100))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    fault = found[0] if found else f"no answer in {PATIENCE:g} s"
    return f"the hub at {endpoint()} cannot be reached ({fault})" if fault else None


def is_hub_id(text: str) -> bool:
    """Whether the text has the form of a repository id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _is_local(what: str) -> bool:
    """Return whether there is such a file or folder. Raises UserError if not and it cannot be a hub id."""
    path = Path(os.path.expanduser(what))  # pathlib's raises for an unknown user
    if os.path.exists(path):
        return True
    if is_hub_id(what) and path.parts[0] != "runs":  # runs/demo has the form of an id but is a path
        return False
    while not path.parent.is_dir():
        path = path.parent
    names = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    near = ", ".join(str(path.parent / name) for name in difflib.get_close_matches(path.name, names))
    raise UserError(f"there is no folder {what}{f' (similar: {near})' if near else ''}; give another, or a hub id.")


def model_folder(path: str) -> str:
    """Return the folder of a model: `runs/x/sft/model` for `runs/x/sft`.

    A hub id or a .gguf file (llama.cpp's format) is returned unchanged.
    """
    folder = Path(os.path.expanduser(path))
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / "run.json").exists():
        raise NotFinishedError(f"{folder} has no model; 'make {folder.name} NAME={folder.parent.name}' makes it.")
    if folder.is_file() and folder.suffix != ".gguf":
        raise UserError(f"{path} is a file; give its folder, {folder.parent}, or a hub id or .gguf file.")
    return str(folder) if _is_local(path) else path


def open_pretrained(kind: Any, where: str, setting: str, **options: Any) -> Any:
    """Load a model, tokenizer or configuration by `kind.from_pretrained`; a model in fp32, from safetensors.

    Refuse what could run a stranger's code: custom code, and pickled weights unless RLHF_ALLOW_PICKLE=1.
    Quantized weights of a .gguf file become fp32.
    """
    safe = os.environ.get("RLHF_ALLOW_PICKLE") != "1"
    file = Path(where) if where.endswith(".gguf") and Path(where).is_file() else None
    if hasattr(kind, "from_config"):  # a model
        options |= {"dtype": "float32", "use_safetensors": safe or None}
        if file:
            from transformers import GgufConfig

            options.setdefault("quantization_config", GgufConfig(dequantize=True))  # packed weights cannot be trained
    if file:
        options["gguf_file"] = file.name
    with explain_failures(where, setting):
        if not file:
            _check_files(where, setting)
            _check_numbers(where)
        try:
            # Without trust_remote_code=False transformers asks at the terminal.
            opened = kind.from_pretrained(str(file.parent) if file else where, trust_remote_code=False, **options)
            if file:
                opened.name_or_path = where
            if hasattr(opened, "encode"):
                opened("a")  # some errors in a tokenizer's files appear only now
            return opened
        except OSError as error:
            if safe and "safetensors" in str(error) and (_is_local(where) or not hub_silence()):
                raise UserError(
                    f"{setting}={where} has no safetensors weights; if you trust it, set RLHF_ALLOW_PICKLE=1."
                ) from error
            raise


def _check_files(where: str, setting: str) -> None:
    """Refuse a pipe, and a weights index that leads out of its folder. The hub's client never leaves its cache."""
    for path in Path(where).glob("*.*"):
        if not path.is_file() and not path.is_dir() and path.exists():
            raise UserError(f"{setting}={where}: {path.name} is not a regular file; delete it, or give another folder.")
    for index in Path(where).glob("*.index.json"):
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(name).name != name:
                raise UserError(
                    f"{setting}={where}: {index.name} names {name}; it may name only files in its own folder. "
                    "Correct it, or give another folder."
                )


def _check_numbers(where: str) -> None:
    """Refuse a configuration with too many parts or a NaN, because building the model does not fail on it."""
    from transformers import PreTrainedConfig

    with suppress(OSError):  # an adapter's folder has none
        config, _ = PreTrainedConfig.get_config_dict(where)
        for each in (config, *(inner for inner in config.values() if isinstance(inner, dict))):
            for name, value in each.items():
                if isinstance(value, float) and math.isnan(value):
                    raise ValueError(f"its config.json has NaN for {name}")
                if re.search("layer|label|head|expert", name) and isinstance(value, int) and value > _MOST_PARTS:
                    raise ValueError(f"its config.json has more than {_MOST_PARTS} for {name}")
