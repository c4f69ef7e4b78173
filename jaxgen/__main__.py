"""`python -m jaxgen`: the `jaxgen` command."""

import sys

from jaxgen.cli.main import main

sys.exit(main())
