"""Fixtures of tests/serve."""
from serving import keys, server, start  # noqa: F401
