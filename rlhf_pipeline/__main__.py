"""`python -m rlhf_pipeline`."""

import sys


def start() -> None:
    """The command line, in one process or in one of several."""
    try:
        from rlhf_pipeline.cli import main
        from rlhf_pipeline.processes import end_at_once, processes
    except KeyboardInterrupt:
        sys.exit(130)
    if processes() > 1:
        end_at_once(main)
    main()


if __name__ == "__main__":
    start()
