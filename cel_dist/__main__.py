"""`python -m cel_dist` is the command `cel`."""

from cel_dist.cli.app import main

if __name__ == "__main__":
    main()
