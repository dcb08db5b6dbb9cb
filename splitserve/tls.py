"""Certificates for gRPC: who this process is, and whom it believes.

Owns the way from PEM files to credentials; knows no address. Invariant: a file that can't be used is one line
at the start (ConfigError), not a failed handshake later.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from splitserve.config import TlsFiles
from splitserve.errors import ConfigError


def check_files(files: TlsFiles) -> None:
    """Raises ConfigError unless the certificate and its key belong together and the CA can be read."""
    context = ssl.create_default_context()
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"certificate {files.cert} with key {files.key}: {_reason(error)}") from error
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except OSError as error:
            raise ConfigError(f"certificate authority {files.ca}: {_reason(error)}") from error


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """With a CA, only clients that show a certificate of it get in. Raises ConfigError."""
    check_files(files)
    pair = (Path(files.key).read_bytes(), Path(files.cert).read_bytes())
    return grpc.ssl_server_credentials([pair], _ca(files), require_client_auth=files.ca is not None)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Shows our certificate; the server's must be of the CA and name the address that was dialled."""
    return grpc.ssl_channel_credentials(_ca(files), Path(files.key).read_bytes(), Path(files.cert).read_bytes())


def _ca(files: TlsFiles) -> bytes | None:
    return None if files.ca is None else Path(files.ca).read_bytes()


def _no_password() -> str:
    raise ValueError("the key is encrypted; a key without a passphrase is needed")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not PEM"
    return getattr(error, "strerror", None) or str(error)
