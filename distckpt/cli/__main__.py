"""python -m distckpt.cli is the `distckpt` command."""

from distckpt.cli import main

if __name__ == "__main__":
    main()
