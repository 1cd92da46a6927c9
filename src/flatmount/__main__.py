"""`python -m flatmount` is the command line."""

import sys

from flatmount.cli.main import main

sys.exit(main())
