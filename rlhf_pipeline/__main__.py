"""`python -m rlhf_pipeline`."""

import sys


def start() -> None:
    """Run the command line, in a single process or as one of several."""
    try:
        from rlhf_pipeline.errors import UserError
        from rlhf_pipeline.processes import end_at_once, processes, rank
        from rlhf_pipeline.usage import asks_for_help, show_usage

        asked = asks_for_help(sys.argv[1:])
        if not asked:
            from rlhf_pipeline.cli import main  # and Hydra with it
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        several = processes() > 1 or rank() > 0
    except UserError as error:  # the rank is unknown, so every process prints this
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if asked:
        return show_usage() if rank() == 0 else None
    if several:
        end_at_once(main)
    main()


if __name__ == "__main__":
    start()
