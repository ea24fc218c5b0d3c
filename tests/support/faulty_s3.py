"""A real S3 server on this machine, moto's, that fails on demand."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass
class Fault:
    """A fault of the next `times` requests of a method whose path and query match a pattern.

    Args:
        status: of the answer; `None` to drop the connection without an answer.
        seconds: delay of the answer.
        carried_out: whether the request is carried out all the same.
    """

    method: str
    pattern: str
    status: int | None
    times: int = 1
    seconds: float = 0.0
    carried_out: bool = False


class FaultyS3:
    """The server, between `start` and `stop`.

    Attributes:
        faults: pending ones; the first that matches a request applies.
        requests: (method, path and query) of every request so far.
        bucket: boto3's view of the bucket.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        self.requests.append((environ["REQUEST_METHOD"], request))
        fault = self._fault(environ["REQUEST_METHOD"], request)
        if fault is None:
            return self.app(environ, start_response)
        if fault.carried_out:
            b"".join(self.app(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        time.sleep(fault.seconds)
        if fault.status is None:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(f"{fault.status or 500} Fault", [("Content-Length", "0")])
        return [b""]

    def _fault(self, method: str, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and method == fault.method and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def count(self, method: str, pattern: str) -> int:
        """Return the number of requests so far of a method that match a pattern."""
        return sum(m == method and re.search(pattern, request) is not None for m, request in list(self.requests))

    @contextmanager
    def empty_bucket(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
        """Make a new bucket named `bucket`, and point the usual environment variables to it."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        self.bucket = boto3.resource("s3").create_bucket(Bucket="bucket")
        self.requests.clear()
        yield self
        self.faults.clear()
        self.bucket.objects.all().delete()
        self.bucket.delete()

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all objects."""
        return [entry.key for entry in self.bucket.objects.filter(Prefix=prefix)]

    def put(self, name: str, content: bytes) -> None:
        self.bucket.put_object(Key=name, Body=content)

    def get(self, name: str) -> bytes:
        return self.bucket.Object(name).get()["Body"].read()
