"""The ``filterdiv`` command."""
