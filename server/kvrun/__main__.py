"""`python -m kvrun` is text-generation-server."""

from kvrun.cli import main

raise SystemExit(main())
