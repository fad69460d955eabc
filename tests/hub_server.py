"""A local model hub: the endpoints that huggingface_hub calls to push and load files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
API = "/api/models/"


@dataclass
class Repository:
    """Commits and the branches that point at them; files by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        all_files = self.commits.get(self.branches.get(branch, ""), {}) | files
        digest = hashlib.sha1(f"{len(self.commits)} {sorted(all_files)}".encode()).hexdigest()
        self.commits[digest] = all_files
        self.branches[branch] = digest
        return digest


class Hub:
    """The content of the server, for tests to inspect.

    Attributes:
        repositories: by ``user/name``.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.url = ""

    def add(self, name: str, folder: Path) -> str:
        """Store a folder as a repository; return the commit."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return self.repositories.setdefault(name, Repository()).commit(files)


class Refused(Exception):
    """An error response."""

    def __init__(self, status: int, code: str = "", content: object = None, commit: str = "") -> None:
        self.status, self.content = status, content or {}
        self.headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {})


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            content, headers = self.route(path, body)
            status = 200
        except Refused as refused:
            content, headers, status = refused.content, refused.headers, refused.status
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, path: str, body: bytes) -> tuple[object, dict[str, str]]:
        if self.command in ("GET", "HEAD"):
            if path.startswith(API):
                return self.information(path)
            return self.file(*path.strip("/").split("/", 4))
        if path.startswith("/large/"):
            self.hub.large[path.removeprefix("/large/")] = body
            return {}, {}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"]), {}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            made = {"url": f"{self.hub.url}/{name}"}
            if name in self.hub.repositories:
                raise Refused(409, content=made)
            repository = self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
            repository.commit({})
            return made, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.large_files(json.loads(body)["objects"]), {}
        user, name, action, branch = path.removeprefix(API).split("/", 3)
        repository = self.repository(f"{user}/{name}")
        if action == "branch":
            if branch in repository.branches:
                raise Refused(409)
            repository.branches[branch] = repository.branches["main"]
            return {}, {}
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [{"path": file, "uploadMode": modes[is_large(file)], "shouldIgnore": False} for file in files]
            }, {}
        assert action == "commit"
        digest = repository.commit(dict(self.committed(body)), branch)
        return {"commitOid": digest, "commitUrl": f"{self.hub.url}/{user}/{name}/commit/{digest}"}, {}

    def validate(self, card: str) -> object:
        described = yaml.safe_load(card.split("---")[1])
        return {"errors": [] if isinstance(described, dict) else [{"message": "no mapping"}], "warnings": []}

    def large_files(self, objects: list[dict]) -> object:
        upload = {"href": f"{self.hub.url}/large/"}
        return {
            "transfer": "basic",
            "objects": [
                asked | {"actions": {"upload": upload | {"href": upload["href"] + asked["oid"]}}} for asked in objects
            ],
        }

    def committed(self, body: bytes) -> Iterator[tuple[str, bytes]]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                yield value["path"], content

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refused(404 if found is None else 401, "RepoNotFound")
        return found

    def files_at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        digest = repository.branches.get(revision, revision)
        if digest not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        return digest, repository.commits[digest]

    def information(self, path: str) -> tuple[object, dict[str, str]]:
        user, repository, *rest = path.removeprefix(API).split("/", 4)
        name, (action, revision, *below) = f"{user}/{repository}", rest or ("revision", "main")
        digest, files = self.files_at(name, revision)
        if below:
            raise Refused(404, "EntryNotFound")  # no repository in the tests has folders
        if action == "tree":
            return [{"type": "file", "path": file} | described(content) for file, content in files.items()], {}
        siblings = [{"rfilename": file} | described(content, is_large(file)) for file, content in files.items()]
        return {"id": name, "sha": digest, "siblings": siblings}, {}

    def file(self, user: str, name: str, *rest: str) -> tuple[object, dict[str, str]]:
        if len(rest) != 3 or rest[0] != "resolve":
            raise Refused(404)
        _, revision, file = rest
        digest, files = self.files_at(f"{user}/{name}", revision)
        if file not in files:
            raise Refused(404, "EntryNotFound", commit=digest)
        etag = hashlib.sha256(files[file]).hexdigest()
        return files[file], {"X-Repo-Commit": digest, "ETag": f'"{etag}"'}


def described(content: bytes, large: bool = False) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    stored = {"lfs": {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}} if large else {}
    return {"oid": digest[:40], "blobId": digest[:40], "size": len(content)} | stored


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free local port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
