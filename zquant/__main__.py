"""`python -m zquant` is the `zquant` command."""

import sys

from zquant.cli.main import main

# convert starts worker processes, which import this module again under another name
if __name__ == "__main__":
    sys.exit(main())
