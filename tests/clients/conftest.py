"""The fixtures of tests/serve, for clients that Debian does not package."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from serving import keys, server, start  # noqa: E402, F401
