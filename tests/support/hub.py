"""A model hub on 127.0.0.1 with a few routes.

It serves the requests of the hub's own client for uploading and downloading small files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Files by repository, kept in memory."""

    repos: dict[str, dict[str, bytes]]
    commits: list[str]

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = self.path.split("/")
        if self.path == "/api/repos/create":
            name = "someone/" + json.loads(body)["name"]
            self.repos.setdefault(name, {})
            return self.answer_json({"url": f"{self.address}/{name}", "name": name})
        if "preupload" in parts:
            files = json.loads(body)["files"]
            return self.answer_json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "commit" in parts:
            lines = [json.loads(line) for line in body.splitlines() if line]
            for line in lines:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos["/".join(parts[3:5])][line["value"]["path"]] = content
                if line["key"] == "header":
                    self.commits.append(line["value"]["summary"])
            return self.answer_json(
                {"commitUrl": f"{self.address}/someone/mine/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        return self.answer_json({"message": "ok"})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        if parts[1] == "api":
            files = self.repos.get("/".join(parts[3:5]))
            if files is None:
                return self.refuse()
            siblings = [{"rfilename": name} for name in files]
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()]
            return self.answer_json(
                tree if "tree" in parts else {"id": "/".join(parts[3:5]), "sha": COMMIT, "siblings": siblings}
            )
        content = self.repos.get("/".join(parts[1:3]), {}).get("/".join(parts[5:]))
        if content is None:
            return self.refuse()
        return self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET  # noqa: N815  the server looks for this name

    def answer_json(self, what: Any) -> None:
        self.answer(json.dumps(what).encode(), {"Content-Type": "application/json"})

    def refuse(self) -> None:
        self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Run a hub; give its address and the hub."""
    handler = type("FreshHub", (Hub,), {"repos": {}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
