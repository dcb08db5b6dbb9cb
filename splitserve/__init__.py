"""What all SplitServe processes share: schemas, configuration, errors, the directory, telemetry, the CLI."""

__version__ = "0.1.0"
