"""``python -m daekit`` and ``accelerate launch -m daekit`` are the command ``daekit``."""

import sys

from daekit.cli import main

if __name__ == "__main__":
    sys.exit(main())
