"""A model hub on 127.0.0.1 that fails on demand: what the hub's own client asks for to upload and to read.

It knows commits and branches, large files by their SHA-256 on another path, private repositories, and tokens that may
read, write or nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

from tests.support.faulty_s3 import Fault

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
LARGE = (".tar", ".parquet", ".png", ".safetensors")  # kept apart from the commits, by their SHA-256
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")  # some of those that a hub knows
PAGE = 7  # entries in a listing
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits with all their files, oldest first, and the last of each branch; if gated, nobody has agreed yet."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, message: str, branch: str = "main") -> str:
        content = "".join(f"{name}{_git_hash(files[name])}" for name in sorted(files))  # the client caches by commit
        oid = hashlib.sha1(f"{len(self.commits)} {message} {content}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    @property
    def files(self) -> Files:
        """Those of the branch `main`."""
        return self.commits[self.branches["main"]]


class Hub:
    """The server, between `start` and `stop`.

    Attributes:
        repos: by the name in their address, `datasets/` before that of a dataset.
        large: the contents of large files by SHA-256.
        faults: pending ones; the first that matches a request applies.
        requests: (method, path and query) of every request so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def count(self, method: str, pattern: str) -> int:
        """Return the number of requests so far of a method that match a pattern."""
        return sum(m == method and re.search(pattern, request) is not None for m, request in list(self.requests))

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        """Add a repository with one commit."""
        self.repos[name] = Repository(private)
        self.repos[name].commit(files, "initial commit")
        return self.repos[name]

    def fault(self, method: str, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and method == fault.method and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def point_to(self, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
        """Have the client in this process, and commands that it starts, use this hub."""
        for name, value in self.environment(token).items():
            monkeypatch.setenv(name, value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def environment(self, token: str | None = None) -> dict[str, str]:
        """The environment variables; this hub has none of the servers of Xet."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class RefusalError(Exception):
    """An answer other than success: its arguments are the status, and the error's code and message in the headers."""


MISSING = RefusalError(404, "RepoNotFound", "Repository not found")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815  the server looks for these names

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.hub.requests.append((self.command, self.path))
        fault = self.hub.fault(self.command, self.path)
        if fault and not fault.carried_out:
            self.answer_fault(fault)
            return
        try:
            content, headers, status = self.route()
        except RefusalError as error:
            status, code, message = error.args
            content, headers = b"{}", {"X-Error-Code": code, "X-Error-Message": message}
        if fault:
            self.answer_fault(fault)
        else:
            self.answer(content, headers, status)

    def answer_fault(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
        else:
            self.answer(b"{}", {}, fault.status)

    def route(self) -> tuple[bytes, dict[str, str], int]:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "large":
            return self.large(parts[1])
        self.user()
        if parts[:2] == ["api", "whoami-v2"]:
            return _json({"name": "someone"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.validate(json.loads(self.body)["content"])
        if parts[:3] == ["api", "repos", "create"]:
            return self.create()
        if parts[0] == "api":
            if len(parts) < 4:
                raise RefusalError(404, "", "Not found")
            kind, owner, name, *rest = parts[1:]
            return self.api(f"{'datasets/' if kind == 'datasets' else ''}{owner}/{name}", rest)
        place = 1 if parts[0] == "datasets" else 0
        repo, rest = "/".join(parts[: place + 2]), parts[place + 2 :]
        if rest[0] == "info":  # NAME.git/info/lfs/objects/batch
            return self.batch(repo.removesuffix(".git"))
        return self.resolve(repo, rest[1], "/".join(rest[2:]))

    def user(self) -> str | None:
        """The token of the request.

        Raises:
            RefusalError: it is not valid.
        """
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER, STRANGER):
            raise RefusalError(401, "", "Invalid credentials in Authorization header")
        return token

    def repo(self, name: str, write: bool = False) -> Repository:
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.user() not in (WRITER, READER)):
            raise MISSING if self.user() else RefusalError(401, "RepoNotFound", "Repository not found")
        if found.gated:
            raise RefusalError(403, "GatedRepo", "Access to this dataset is restricted")
        if write and self.user() != WRITER:
            raise RefusalError(403, "", "you have no right to write")
        return found

    def validate(self, card: str) -> tuple[bytes, dict[str, str], int]:
        header = card.split("---\n")[1:2]
        data = (yaml.safe_load(header[0]) if header else None) or {}
        base, licence = data.get("base_model"), data.get("license", "mit")
        if licence not in LICENCES:
            known = ", ".join(LICENCES)
            return _json({"errors": [{"message": f'"license" must be one of [{known}]'}]}, status=400)
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            return _json({"errors": [{"message": f'"base_model" with value "{base}" is not valid'}]}, status=400)
        return _json({"errors": [], "warnings": []})

    def create(self) -> tuple[bytes, dict[str, str], int]:
        given = json.loads(self.body)
        if self.user() is None:
            raise RefusalError(401, "", "Unauthorized")
        if self.user() != WRITER:
            raise RefusalError(403, "", "you have no right to create")
        name = f"{given.get('organization') or 'someone'}/{given['name']}"
        name = f"datasets/{name}" if given.get("type") == "dataset" else name
        known = name in self.hub.repos
        if not known:
            private = given.get("visibility") == "private" or bool(given.get("private"))
            self.hub.add(name, {".gitattributes": b""}, private)
        return _json({"url": f"{self.hub.url}/{name}"}, status=409 if known else 200)

    def api(self, name: str, rest: list[str]) -> tuple[bytes, dict[str, str], int]:
        action, arguments = (rest[0] if rest else "revision"), rest[1:] or ["main"]
        repo = self.repo(name, write=action in ("preupload", "commit", "branch"))
        if action == "branch":
            repo.branches.setdefault(arguments[0], repo.branches["main"])
            return _json({})
        oid = repo.find(arguments[0])
        if oid is None:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        files = repo.commits[oid]
        if action == "revision":
            facts = {"id": name.removeprefix("datasets/"), "sha": oid, "private": repo.private}
            header = files.get("README.md", b"").decode().split("---\n")[1:2]
            card = yaml.safe_load(header[0]) if header else None
            return _json(facts | {"siblings": [{"rfilename": one} for one in files], "cardData": card})
        if action == "tree":
            return self.tree(files, "/".join(arguments[1:]))
        if action == "paths-info":
            paths = parse_qs(self.body.decode())["paths"]
            return _json([_entry(path, files[path]) for path in paths if path in files])
        if action == "preupload":
            asked = [one["path"] for one in json.loads(self.body)["files"]]
            return _json({"files": [_upload_mode(path, files.get(path)) for path in asked]})
        return self.commit(repo, arguments[0])

    def tree(self, files: Files, folder: str) -> tuple[bytes, dict[str, str], int]:
        query = parse_qs(urlsplit(self.path).query)
        recursive, start = query.get("recursive", ["false"])[0].lower() == "true", int(query.get("cursor", ["0"])[0])
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, Any] = {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            parents = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                inner = prefix + "/".join(parents[:depth])
                if recursive or depth == 1:
                    entries[inner] = {"type": "directory", "path": inner, "oid": "0" * 40, "size": 0}
            if recursive or not parents:
                entries[path] = _entry(path, files[path])
        page = list(entries.values())[start : start + PAGE]
        if folder and not entries:
            raise RefusalError(404, "EntryNotFound", "no such folder")
        more = start + PAGE < len(entries)
        address = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE}"
        content, headers, status = _json(page)
        return content, headers | ({"Link": f'<{address}>; rel="next"'} if more else {}), status

    def commit(self, repo: Repository, branch: str) -> tuple[bytes, dict[str, str], int]:
        header, *lines = (json.loads(line) for line in self.body.splitlines() if line)
        if header["value"].get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise RefusalError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise RefusalError(400, "", "the large file is not there")
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        oid = repo.commit(files, header["value"]["summary"], branch)
        return _json({"commitUrl": f"{self.hub.url}/someone/mine/commit/{oid}", "commitOid": oid, "success": True})

    def batch(self, name: str) -> tuple[bytes, dict[str, str], int]:
        self.repo(name, write=True)
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.hub.large:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}
        return _json({"transfer": "basic", "objects": objects})

    def large(self, oid: str) -> tuple[bytes, dict[str, str], int]:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise RefusalError(400, "", "not of that SHA-256")
            self.hub.large[oid] = self.body
            return b"", {}, 200
        return self.part_of(self.hub.large[oid], {})

    def resolve(self, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str], int]:
        repo = self.repo(name)
        oid = repo.find(revision)
        if oid is None:
            raise RefusalError(404, "RevisionNotFound", "Invalid rev id")
        if path not in repo.commits[oid]:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        content = repo.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not path.endswith(LARGE):
            return self.part_of(content, headers)
        digest = hashlib.sha256(content).hexdigest()
        self.hub.large[digest] = content
        place = self.hub.url.replace(
            "127.0.0.1", "localhost"
        )  # another host, as the real one's: the client looks no further
        headers |= {"Location": f"{place}/large/{digest}", "X-Linked-Size": str(len(content))}
        return b"", headers | {"X-Linked-ETag": f'"{digest}"'}, 302

    def part_of(self, content: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str], int]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return content, headers | {"Accept-Ranges": "bytes"}, 200
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            raise RefusalError(416, "", "beyond the end")
        return content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, 206

    def answer(self, content: bytes, headers: dict[str, str], status: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _json(what: Any, status: int = 200) -> tuple[bytes, dict[str, str], int]:
    return json.dumps(what).encode(), {"Content-Type": "application/json"}, status


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _upload_mode(path: str, content: bytes | None) -> dict[str, Any]:
    """How a file is to be uploaded, and the hash of what is there."""
    large = path.endswith(LARGE)
    there = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_hash(content)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": there}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub."""
    server = Hub()
    server.start()
    try:
        yield server
    finally:
        server.stop()
