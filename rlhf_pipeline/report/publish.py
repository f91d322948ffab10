"""Upload a finished model to the hub, with its card."""

import shlex
import sys
from collections.abc import Sequence

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import endpoint, reason_of, why_unreachable
from rlhf_pipeline.report.cards import CARD, model_card, with_model_id
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Hub, Settings
from rlhf_pipeline.stages import TRAINED

# Messages by HTTP status. The token itself is never shown.
_REFUSED = {
    401: "the hub rejects the token; set HF_TOKEN to a valid one, or run hf auth login",
    403: "the token has no write access to {}; use a token that has, or another name",
}


def publish(out: RunDir, to: Hub) -> None:
    """Upload the model of a finished stage. Any failure raises UserError with the command to try again."""
    if not out.model.is_dir():
        raise UserError(f"{out.path} has no model to push; use hub.push= with a stage that makes one.")
    try:
        address = _upload(out, str(to.push), to.private)
    except Exception as error:  # the client raises errors of many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _REFUSED[status].format(to.push) if status in _REFUSED else reason_of(error, 300).rstrip(".")
        words = [out.record["command"], shlex.quote(f"hub.push={to.push}")] + ["hub.private=false"] * (not to.private)
        raise UserError(
            f"hub.push={to.push}: {reason}. {out.model} is kept; to try again: {' '.join(words)}"
        ) from error
    print(f"{out.model} -> {address}", flush=True)


def last_model(every: Sequence[Settings]) -> Settings:
    """Return the settings of the stage whose model a pipeline pushes: the last trained policy, else the reward."""
    trained = [settings for settings in every if settings.stage in TRAINED]
    if not trained:
        raise UserError("no stage of this pipeline makes a model, so there is nothing for hub.push= to upload.")
    return sorted(trained, key=lambda settings: TRAINED.index(settings.stage))[-1]


def _upload(out: RunDir, repository: str, private: bool) -> str:
    """Upload the model's files and its card in one commit; returns the address as text to print."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    own = out.model / CARD
    for path in [out.model, *sorted(out.model.rglob("*"))]:
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, which is not uploaded; replace it with the file itself")
    if silence := why_unreachable():
        raise UserError(silence)
    if not (token := get_token()):
        raise UserError(f"the hub at {endpoint()} needs a token; set HF_TOKEN, or run hf auth login")
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub = HfApi(endpoint=constants.ENDPOINT, token=token)
    hub.create_repo(repository, private=private, exist_ok=True)
    is_private = bool(hub.model_info(repository).private)
    if private and not is_private:
        raise UserError("it exists already and is public; add hub.private=false, or choose another name")
    # Not upload_folder: the uploaded card differs from the local one, and both must be in one commit.
    text = with_model_id(own.read_text(encoding="utf-8") if own.is_file() else model_card(out.path), repository)
    files = [path for path in sorted(out.model.rglob("*")) if path.is_file() and path != own]
    operations = [CommitOperationAdd(path.relative_to(out.model).as_posix(), path) for path in files]
    hub.create_commit(
        repository, [*operations, CommitOperationAdd(CARD, text.encode())], commit_message=f"{out.stage} of {out.name}"
    )
    return f"{endpoint()}/{repository} ({'private' if is_private else 'public'}, {len(files) + 1} files)"
