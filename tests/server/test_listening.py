"""The socket's side: headers that do not arrive, a connection that goes on."""

import socket
import time

import httpx
import pytest
from server_helpers import KEY, ScriptedEngine
from server_helpers import listening as serving

from sevenfold.server import listening


def test_headers_that_do_not_arrive_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_HEADERS_S", 0.3)
    with serving(ScriptedEngine()) as url:
        port = int(url.rpartition(":")[2])
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
                slow.sendall(sent)
                assert slow.recv(1) == b""  # it was hung up on
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
            body = {"prompt": "a", "max_tokens": 3}
            for _ in range(2):
                assert client.post("/v1/completions", json=body).status_code == 200
                time.sleep(0.6)  # between requests, one connection may wait longer
