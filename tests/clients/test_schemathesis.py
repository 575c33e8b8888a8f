"""Schemathesis makes requests from openapi.json and judges the answers: no 5xx, nothing that the document does not say."""
import os
import subprocess
import sys
from pathlib import Path

CASES = int(os.environ.get("QVL_TEST_CASES", "2000"))


def test_no_server_errors_and_no_violations(server):
    operations = 20
    command = [Path(sys.executable).parent / "schemathesis", "run", server.url + "/openapi.json", "--phases=examples,coverage,fuzzing", f"--max-examples={CASES // operations}",
               "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance",
               "--request-timeout=60", "--workers=1", "--seed=1", "--no-color", "--exclude-path=/ws", "--suppress-health-check=all"]
    r = subprocess.run(command, capture_output=True, text=True)
    print(r.stdout[-3000:])
    assert r.returncode == 0, r.stdout[-8000:]
    assert server.get("/health").status_code == 200 and server.idle(20)
