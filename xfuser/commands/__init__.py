"""What the ``xdit`` command does, one module a subcommand; none is imported before it is asked for."""
