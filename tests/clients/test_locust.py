"""Locust with the report's task."""
import json
import subprocess
import sys
from pathlib import Path


def test_the_reports_load(server):
    r = subprocess.run([Path(sys.executable).parent / "locust", "-f", Path(__file__).with_name("report_locustfile.py"), "--headless", "-u", "50", "-r", "25", "-t", "15s",
                        "-H", server.url, "--json", "--exit-code-on-error", "1"], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    stats = json.loads(r.stdout[r.stdout.index("["):])[0]
    print(f"{stats['num_requests']} requests, {stats['num_failures']} failures")
    assert stats["num_failures"] == 0 and stats["num_requests"] > 100
