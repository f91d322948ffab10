"""Taking a finished model to the hub, with its card."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_pipeline.cards import CARD, card, named
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import why_unreachable
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.settings import TRAINED, Hub, Settings


def publish(out: RunDir, to: Hub) -> None:
    """Upload the model of a finished stage. Whatever fails is a `UserError` with the command that tries again."""
    assert to.push
    if not out.model.is_dir():
        raise UserError(f"{out.path} has no model to push; hub.push= goes with a stage that makes one.")
    try:
        address = _upload(out, to.push, to.private)
    except Exception as error:  # the client raises what its server, its transport and its own checks raise
        again = f"{out.record['command']} {shlex.quote(f'hub.push={to.push}')}" + (
            "" if to.private else " hub.private=false"
        )
        raise UserError(
            f"hub.push={to.push}: {_reason(error, to.push)}. {out.model} is whole and stays; to try again: {again}"
        ) from error
    print(f"{out.model} -> {address}", flush=True)


def last_model(every: Sequence[Settings]) -> Settings:
    """The stage whose model a pipeline is known by: the policy that is trained last, else the reward."""
    trained = [settings for settings in every if settings.stage in TRAINED]
    if not trained:
        raise UserError("no stage of this pipeline makes a model, so there is nothing for hub.push= to take.")
    return sorted(trained, key=lambda settings: TRAINED.index(settings.stage))[-1]


def _upload(out: RunDir, repository: str, private: bool) -> str:
    """One commit of the model's files and its card; where it went, in words."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if silence := why_unreachable():
        raise UserError(silence)
    if not (token := get_token()):
        raise UserError(
            f"the hub at {constants.ENDPOINT} takes no model without a token; set HF_TOKEN, or run hf auth login"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi(endpoint=constants.ENDPOINT, token=token)
    hub.create_repo(repository, private=private, exist_ok=True)
    is_private = bool(hub.model_info(repository).private)
    if private and not is_private:
        raise UserError("it is there already and public; say hub.private=false, or choose another name")
    own = out.model / CARD
    text = named(own.read_text(encoding="utf-8") if own.exists() else card(out.path), repository)
    files: dict[str, Path | bytes] = {
        str(p.relative_to(out.model)): p for p in sorted(out.model.rglob("*")) if p.is_file()
    }
    files[CARD] = text.encode()
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    hub.create_commit(repository, operations, commit_message=f"{out.stage} of {out.name}")
    return f"{constants.ENDPOINT}/{repository} ({'private' if is_private else 'public'}, {len(files)} files)"


def _reason(error: Exception, repository: str) -> str:
    """In one line, without the token: a transport's complaint may quote the header that holds it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know the token; set HF_TOKEN to another, or run hf auth login"
    if status == 403:
        return f"the token may not write to {repository}; give it the right to, or choose a name of your own"
    text = str(error).strip() or type(error).__name__
    return re.sub(r"(?i)(bearer )\S+", r"\1***", " ".join(text.split())).rstrip(".")[:300]
