"""A small Hub on the loopback: speaks what `huggingface_hub` asks, keeps everything in memory.

Answers are those of the Hub's HTTP API: repository info, tree, `resolve` with ETag, commit and ranges, LFS
batch and upload, preupload, commit (NDJSON), gated and private repositories, and a connection that breaks.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".tar", ".png", ".arrow")
"""Files that LFS keeps; all others are of git."""


@dataclass
class Repository:
    """One repository: its commits, each with all files, and what main is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes]) -> str:
        """A new commit of exactly these files; main is it."""
        digest = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode())
        self.head = digest.hexdigest()
        self.commits[self.head] = dict(files)
        return self.head


def oid(content: bytes) -> str:
    """The number git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server; `with HubServer() as hub` serves at `hub.url`.

    Attributes:
        requests: (method, path, Range) of every request, in order.
        breaks: {a file's name: how often its connection breaks in the middle}.
        token: what opens gated and private repositories and lets commits in.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.breaks: dict[str, int] = {}
        self.token = "hf_test"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, folder: Path | Mapping[str, bytes], kind: str = "model", **said: bool) -> str:
        """Put a folder's files (or these) there as a new commit of `owner/name`; returns the commit."""
        if isinstance(folder, Path):
            found = sorted(file for file in folder.rglob("*") if file.is_file())
            folder = {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
        repository = self.repositories.setdefault(f"{kind}s/{name}", Repository(**said))
        return repository.commit(folder)

    def files(self, name: str, kind: str = "model") -> dict[str, bytes]:
        """The files of a repository's main."""
        repository = self.repositories[f"{kind}s/{name}"]
        return repository.commits[repository.head]

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order, each once."""
        asked = [path for verb, path, _ in self.requests if verb == "GET" and "/resolve/" in path]
        return list(dict.fromkeys(path.split("/resolve/")[1].split("/", 1)[1] for path in asked))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *said: object) -> None:
        """Nothing is printed."""

    def answer(self, status: int, content: bytes | object = b"", **headers: str) -> None:
        """The whole answer; what is no bytes as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, sentence: str) -> None:
        """An error as the Hub says it."""
        self.answer(status, {"error": sentence}, X_Error_Code=code, X_Error_Message=sentence)

    def do_HEAD(self) -> None:
        """As GET, without content."""
        self.do_GET()

    def _log(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        return path.strip("/").split("/")

    def _allowed(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _open(self, name: str, revision: str, content: bool = True) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a revision; None after an answer that says why not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._allowed()):
            self.refuse(401 if not self._allowed() else 404, "RepoNotFound", "Repository not found")
            return None
        if repository.gated and content and not self._allowed():
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated.")
            return None
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def do_GET(self) -> None:
        """Info, tree or a file."""
        parts = self._log()
        if parts[:2] == ["api", "whoami-v2"]:
            self.answer(200, {"name": "tester", "type": "user", "orgs": []})
        elif parts[0] == "api":
            name, rest = "/".join(parts[1:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            if opened := self._open(name, revision, content=False):
                commit, files = opened
                if rest[:1] == ["tree"]:
                    self.answer(200, [self._entry(path, content) for path, content in files.items()])
                else:
                    siblings = [{"rfilename": path} for path in files]
                    info = {"id": "/".join(parts[2:4]), "sha": commit, "siblings": siblings, "tags": []}
                    self.answer(200, {**info, "private": False, "downloads": 0, "likes": 0})
        else:
            kind = "models"
            if parts[0] == "datasets":
                kind, parts = "datasets", parts[1:]
            if opened := self._open(f"{kind}/{parts[0]}/{parts[1]}", parts[3]):
                self._file(opened[0], opened[1], "/".join(parts[4:]))

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content, large = files[path], path.endswith(LARGE)
        tag = hashlib.sha256(content).hexdigest() if large else oid(content)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and self.hub.breaks.get(path, 0) > 0:
            self.hub.breaks[path] -= 1
            self.send_response(206 if begin else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin : begin + (len(content) - begin) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.answer(206 if begin else 200, content[begin:], **headers)

    def do_POST(self) -> None:
        """A new repository, what LFS wants to know, or a commit."""
        parts, body = self._log(), self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if parts[-1] == "validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif not self._allowed():
            self.refuse(401, "", "Invalid username or password.")
        elif parts == ["api", "repos", "create"]:
            said = json.loads(body)
            name = f"models/{said.get('organization') or 'tester'}/{said['name']}"
            if name in self.hub.repositories:
                self.answer(409, {"error": "You already created this model repo"})
                return
            repository = self.hub.repositories[name] = Repository(private=said.get("visibility") == "private")
            repository.commit({})
            self.answer(200, {"url": f"{self.hub.url}/{name.removeprefix('models/')}", "name": name})
        elif parts[-2:] == ["objects", "batch"]:
            objects = [self._upload(one) for one in json.loads(body)["objects"]]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "preupload" in parts:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
                for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in files]})
        elif "commit" in parts:
            self._commit("/".join(parts[1:4]), body)
        else:
            self.answer(404, {"error": f"nothing at {self.path}"})

    def _upload(self, one: dict[str, object]) -> dict[str, object]:
        if one["oid"] in self.hub.large:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.head])
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif said["key"] == "deletedFile":
                files.pop(value["path"])
        commit = repository.commit(files)
        url = f"{self.hub.url}/{name.removeprefix('models/')}/commit/{commit}"
        self.answer(200, {"commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def do_PUT(self) -> None:
        """A large file; its number must be that of its content."""
        parts, left = self._log(), self.headers.get("Content-Length")
        content = self.rfile.read(int(left)) if left is not None else self._chunks()
        digest = hashlib.sha256(content).hexdigest()
        if digest != parts[1]:
            self.answer(400, {"error": "this is another file"})
            return
        self.hub.large[digest] = content
        self.answer(200)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found
