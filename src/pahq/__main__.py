"""``python -m pahq`` is the same as ``pahq``."""

from pahq.cli.app import main

main()
