"""Every claim about speed, as a command with its record: `python -m benchmarks --help`."""
