#!/usr/bin/env python3
"""The health check of the image: exit code 0 if the process at the URL says that it is ready, else 1 and why.

The URL is the first argument, else ``READY_URL``. A process that speaks TLS is asked over TLS whatever the URL
says, and may show any certificate: it is our own. Probes need no key. Standard library only; no proxy is asked.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT = 3.0  # seconds


def why_not_ready(url: str) -> str:
    """Empty when ready."""
    try:
        return _answer(url)
    except OSError as plain:  # what a TLS port does to a question without TLS is one, too
        if not url.startswith("http:"):
            return str(plain)
        try:
            return _answer("https:" + url.removeprefix("http:"))
        except OSError:
            return str(plain)


def _answer(url: str) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=TIMEOUT):
            return ""
    except urllib.error.HTTPError as error:
        return error.read(1000).decode(errors="replace").strip() or str(error)


if __name__ == "__main__":
    sys.exit(why_not_ready(sys.argv[1] if len(sys.argv) > 1 else os.environ["READY_URL"]) or None)
