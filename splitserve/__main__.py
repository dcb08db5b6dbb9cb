"""``python -m splitserve``: the command line."""

from splitserve.cli.main import main

if __name__ == "__main__":
    main()
