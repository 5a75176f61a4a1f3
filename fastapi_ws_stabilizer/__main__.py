"""Entry point of `python -m fastapi_ws_stabilizer`."""

import sys

from fastapi_ws_stabilizer.cli import main

if __name__ == "__main__":
    sys.exit(main())
