"""Opening what lies in a folder or on the Hugging Face hub, with failures that say what to do."""

import difflib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.files import disk_error

PATIENCE = 5.0  # seconds in which a hub has to answer
_ELSE = (
    "give a local path; behind a firewall set HF_ENDPOINT to a mirror; with no network run the offline demo: make demo"
)


@contextmanager
def explained(what: str, setting: str) -> Iterator[None]:
    """Turn the dozen ways in which a hub or a folder fails into one line.

    What is no local file or folder is asked of the hub if it answers, and looked for in the cache if it does not.
    """
    local = _is_here(what)
    if not local and (what.startswith((".", "/", "~")) or what.count("/") > 1):  # no hub id looks like this
        raise UserError(f"{setting}: there is no folder {what}{_near(what)}; give one that is there, or a hub id.")
    silence = None if local else hub_silence()
    try:
        yield
    except Exception as error:
        from huggingface_hub import constants

        if fault := disk_error(error, Path(constants.HF_HOME)):
            raise fault from error
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{setting}={what} {_reason(what, error, local, silence)}.") from error


def _reason(what: str, error: BaseException, local: bool, silence: str | None) -> str:
    from huggingface_hub import constants

    kinds = {type(cause).__name__ for cause in _causes(error)}  # by name: datasets takes long to import
    reason = (str(error) or type(error).__name__).strip().split("\n")[0][:200]
    if local or "HFValidationError" in kinds:
        return f"could not be opened ({reason}); {_ELSE}"
    if silence:
        missing = kinds & {"LocalEntryNotFoundError", "ConnectionError"}
        state = "is not in the cache" if missing else f"could not be opened ({reason}) from the cache"
        return f"{state} ({constants.HF_HOME}), and {silence}; {_ELSE}"
    if "GatedRepoError" in kinds:
        return f"asks for consent: give it on its page at {constants.ENDPOINT}, then set HF_TOKEN or run hf auth login"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"is no folder here{_near(what)}, and the hub at {constants.ENDPOINT} has no such repository; "
            "correct the name, or set HF_TOKEN if it is a private one"
        )
    return f"could not be opened ({reason}); {_ELSE}"


@cache
def hub_silence() -> str | None:
    """Why the hub is not asked, or None if it answers. Found out once a process, within seconds.

    The client itself would try five times a file, which takes a minute. So where a hub does not answer, this process
    and its children go offline: from here on they use the cache alone.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "the hub is not asked while HF_HUB_OFFLINE is set"
    fault = _fault(constants.ENDPOINT)
    if fault is None:
        return None
    silence = f"the hub at {constants.ENDPOINT} cannot be reached ({fault})"
    print(f"{silence}: only what is in the cache ({constants.HF_HOME}) can be opened.", flush=True)
    constants.HF_HUB_OFFLINE = True  # what huggingface_hub and transformers look at
    os.environ["HF_HUB_OFFLINE"] = "1"  # what peft and child processes look at
    if "datasets" in sys.modules:  # it keeps a copy; imported later, it takes the value from above
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return silence


def why_unreachable() -> str | None:
    """Why nothing can be taken to the hub, or None. Unlike `hub_silence` it takes no process offline."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return hub_silence()
    fault = _fault(constants.ENDPOINT)
    return f"the hub at {constants.ENDPOINT} cannot be reached ({fault})" if fault else None


def _fault(endpoint: str) -> str | None:
    """What is wrong with an endpoint; any HTTP answer is none.

    In a thread, for the client's timeout is one for each of a host's addresses, and looking those up has none.
    """
    from huggingface_hub import get_session  # with the proxies and certificates of the downloads to come

    answer: list[str | None] = [f"no answer in {PATIENCE:g} s"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=PATIENCE, follow_redirects=False)
            answer.append(None)
        except Exception as error:  # of httpx, httpx2, ssl or socket, by the client's version
            if "Timeout" not in type(error).__name__:
                answer.append((str(error) or type(error).__name__).split("\n")[0][:100])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[-1]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_here(what: str) -> bool:
    return os.path.exists(os.path.expanduser(what))  # pathlib's raise where one may not look, or a user is unknown


def _near(what: str) -> str:
    """What the folder that a path leads into has of like name, to put into a message."""
    path = Path(os.path.expanduser(what))
    while not path.parent.is_dir():
        path = path.parent
    names = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
    found = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    return f" (near it: {', '.join(found)})" if found else ""


def is_hub_id(text: str) -> bool:
    """Whether this has the form of a repository's id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def model_folder(path: str) -> str:
    """A folder that holds a model: `runs/x/sft` stands for `runs/x/sft/model`. A hub id is given back as it is."""
    folder = Path(path).expanduser()
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / "run.json").exists():
        raise NotFinishedError(f"{folder} has no model; 'make {folder.name} NAME={folder.parent.name}' makes it.")
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise UserError(f"{path} is a file; give its folder, {folder.parent}, or a hub id.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:  # no hub id looks like this
        raise UserError(f"there is no folder {path}{_near(path)}; give one that holds a model, or a hub id.")
    return path


def open_pretrained(kind: Any, where: str, setting: str, **options: Any) -> Any:
    """A model by `kind.from_pretrained`, in fp32, from safetensors.

    A checkpoint that only has pickled weights is refused, unless RLHF_ALLOW_PICKLE=1: unpickling can run code.
    """
    pickle_allowed = os.environ.get("RLHF_ALLOW_PICKLE") == "1"
    with explained(where, setting):
        try:
            use = None if pickle_allowed else True
            return kind.from_pretrained(where, dtype="float32", use_safetensors=use, **options)
        except OSError as error:
            whole = _is_here(where) or not hub_silence()  # a cache may lack what the hub has
            if "safetensors" in str(error) and whole and not pickle_allowed:
                raise UserError(
                    f"{setting}={where} has no safetensors weights; if you trust it, set RLHF_ALLOW_PICKLE=1."
                ) from error
            raise
