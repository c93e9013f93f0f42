"""``python -m hayhost``."""

from .cli import main

main()
