"""``python -m smoe`` is the ``smoe`` command."""

from .cli import main

raise SystemExit(main())
