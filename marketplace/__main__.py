"""`python -m marketplace`: the `tollway` command."""

from marketplace.cli import main

main()
