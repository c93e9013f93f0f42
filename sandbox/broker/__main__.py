"""``python -I -m sandbox.broker FD``."""

from .server import main

if __name__ == "__main__":
    main()
