"""``python -m expunge`` does what ``expunge`` does."""

from expunge.cli.main import main

if __name__ == "__main__":
    main()
