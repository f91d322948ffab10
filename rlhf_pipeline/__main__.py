"""`python -m rlhf_pipeline`."""

from rlhf_pipeline.cli import main

if __name__ == "__main__":
    main()
