"""The HTTP front of the router: OpenAI's API."""

from router.http.app import create_app
from router.http.service import HttpConfig

__all__ = ["HttpConfig", "create_app"]
