#!/usr/bin/env python3
"""The health check of the image: exit code 0 if the process at the URL says that it is ready, else 1 and why.

The URL is the first argument, else ``READY_URL``. Standard library only; proxies are never asked.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT = 3.0  # seconds


def why_not_ready(url: str) -> str:
    """Empty when ready."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT):
            return ""
    except urllib.error.HTTPError as error:
        return error.read(1000).decode(errors="replace").strip() or str(error)
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(why_not_ready(sys.argv[1] if len(sys.argv) > 1 else os.environ["READY_URL"]) or None)
