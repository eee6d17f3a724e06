"""``python -m lightning_filterdiv``."""

from lightning_filterdiv.command_line.main import main

raise SystemExit(main())
