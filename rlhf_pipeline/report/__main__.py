"""Draw the pages of a run again: `python -m rlhf_pipeline.report runs/demo [en|zh]`."""

import re
import sys
from pathlib import Path

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.files import stages_below
from rlhf_pipeline.report.stage import write_report
from rlhf_pipeline.report.words import LANGUAGES


def rebuild(folder: Path, lang: str | None = None) -> list[Path]:
    """Draw the pages of all stages, rounds and sweeps below a folder. `lang=None` keeps each page's language."""
    # Imported here: these modules are of a higher layer, and only this command needs them.
    from rlhf_pipeline.report.rounds import write_rounds
    from rlhf_pipeline.sweeps.jobs import JOB, read_job
    from rlhf_pipeline.sweeps.results import write_sweep

    if lang not in (None, *LANGUAGES):
        raise UserError(f"no report language is called '{lang}'; choose one of: {', '.join(LANGUAGES)}.")
    folder = folder.resolve() if folder == Path() else folder  # the current folder has no name
    stages = stages_below(folder) if folder.is_dir() else []
    # The runs of a comparison have a job.json too, but without a stage; its page is the page of stage=compare.
    sweeps = sorted({path.parent.parent for path in folder.rglob(JOB) if read_job(path.parent).get("stage")})
    if not stages and not sweeps:
        raise UserError(f"{folder} holds no run; name a folder such as runs/demo or runs/demo/ppo.")
    pages = [write_report(stage, lang) for stage in stages]
    runs = {stage.parent.parent for stage in stages if re.fullmatch("round[1-9][0-9]*", stage.parent.name)}
    pages += [write_rounds(run.parent, run.name, lang) for run in sorted(runs) if run.is_relative_to(folder)]
    return pages + [write_sweep(path, lang) for path in sweeps]


def main(arguments: list[str]) -> int:
    """Return the exit status: 0 for success, 2 for an error that the user can fix."""
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for path in rebuild(Path(arguments[0]), *arguments[1:]):
            print(path)
    except UserError as error:
        print(f"{error.kind}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
