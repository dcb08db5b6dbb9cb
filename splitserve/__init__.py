"""What all SplitServe processes share: schemas, configuration, errors, the directory, telemetry, the CLI."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when gRPC is loaded; its remarks on forks help nobody

__version__ = "0.1.0"
