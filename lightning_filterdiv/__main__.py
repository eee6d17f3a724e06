"""``python -m lightning_filterdiv``."""

from lightning_filterdiv.cli import main

raise SystemExit(main())
