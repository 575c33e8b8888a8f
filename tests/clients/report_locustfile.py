"""The load test of the report: users who wait one to three seconds and send a question with a picture written as Markdown.

Run: locust -f tests/clients/report_locustfile.py --headless -u 100 -r 20 -t 60s -H http://127.0.0.1:8080
"""
import base64
from pathlib import Path

from locust import HttpUser, between, task

PICTURE = base64.b64encode((Path(__file__).resolve().parents[2] / "examples" / "images" / "four.jpg").read_bytes()).decode()


class VisionUser(HttpUser):
    wait_time = between(1, 3)

    @task
    def ask(self):
        body = {"model": "qvl-tiny", "max_tokens": 64, "messages": [{"role": "user", "content": f"![image](data:image/jpeg;base64,{PICTURE}) What do you see?"}]}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as r:
            if r.status_code != 200:
                r.failure(f"status {r.status_code}: {r.text[:200]}")
            elif r.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0:
                r.failure("the picture was taken for text")
