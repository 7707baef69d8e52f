"""A small stand-in for the model hub on 127.0.0.1, for the real client: what it asks for, and no more."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of-alice"
WHO = {"type": "user", "name": "alice", "orgs": [{"name": "acme"}]}


class Hub(ThreadingHTTPServer):
    """Models as {"user/name": [(commit, {file: bytes}), …]}, the oldest commit first.

    Attributes:
        asked: (method, path) of each request.
        status: what every request is answered with, if it is not None.
        refuses: paths that begin so are answered with 403.
        private: names of models that need the token.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.tags, self.blobs, self.asked = {}, {}, {}, []
        self.status, self.refuses, self.private = None, "-", set()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, name, files, tag=None):
        """Commit files to a model, beside those that it has, and return the commit."""
        commits = self.models.setdefault(name, [])
        files = (commits[-1][1] if commits else {}) | files
        commit = hashlib.sha1(repr((name, len(commits), sorted(files))).encode()).hexdigest()
        commits.append((commit, files))
        if tag is not None:
            self.tags[name, tag] = commit
        return commit

    def files(self, name):
        return self.models[name][-1][1]

    def find(self, name, revision):
        """Return the commit and the files of a revision; None if there is none."""
        commits = self.models[name]
        newest = commits[-1][0] if commits else None
        wanted = newest if revision == "main" else self.tags.get((name, revision), revision)
        return next((pair for pair in commits if pair[0] == wanted), None)

    @property
    def fetched(self):
        """Return the files whose content was asked for."""
        paths = [path for verb, path in self.asked if verb == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(data)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code, status=404):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self):
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size) if size else self.chunks()
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append((self.command, path))
        if hub.status is not None:
            return self.answer(b"", hub.status)
        if path.startswith(hub.refuses):
            return self.answer({"error": "no"}, 403, X_Error_Message="no")
        for pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None:
                return answer(self, *found.groups())
        return self.answer(b"", 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def chunks(self):
        """Return the body of a request that is sent in chunks."""
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    @property
    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def found(self, name, revision):
        """Return the commit and the files of a revision; if there is none, say so and return None."""
        hub = self.server
        if name not in hub.models or (name in hub.private and not self.is_known):
            return self.missing("RepoNotFound", 404 if self.is_known else 401)
        pair = hub.find(name, revision or "main")
        return self.missing("RevisionNotFound") if pair is None else pair

    def whoami(self):
        self.answer(WHO) if self.is_known else self.missing("Invalid", 401)

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization'] or WHO['name']}/{asked['name']}"
        if not self.is_known:
            return self.missing("Invalid", 401)
        known = name in self.server.models
        if not known:
            self.server.models[name] = []
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
        return self.answer({"url": f"{self.server.address}/{name}", "name": name}, 409 if known else 200)

    def info(self, name, revision=None):
        pair = self.found(name, revision)
        if pair is not None:
            files = [{"rfilename": file, "size": len(data)} for file, data in sorted(pair[1].items())]
            self.answer({"id": name, "sha": pair[0], "siblings": files})

    def tree(self, name, revision):
        pair = self.found(name, revision)
        if pair is not None:
            self.answer([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in pair[1].items()])

    def resolve(self, name, revision, file):
        pair = self.found(name, revision)
        if pair is None:
            return None
        commit, files = pair
        if file not in files:
            return self.missing("EntryNotFound")
        tag = hashlib.sha256(files[file]).hexdigest()
        return self.answer(files[file], X_Repo_Commit=commit, ETag=f'"{tag}"')

    def preupload(self, name, revision):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths]
        files = [
            {"path": path, "uploadMode": mode, "shouldIgnore": False}
            for path, mode in zip(paths, modes, strict=True)
        ]
        self.answer({"files": files})

    def batch(self, name):
        objects = [
            file | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{file['oid']}"}}}
            for file in json.loads(self.body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.answer()

    def commit(self, name, revision):
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            about = line["value"]
            if line["key"] == "file":
                files[about["path"]] = base64.b64decode(about["content"])
            elif line["key"] == "lfsFile":
                files[about["path"]] = self.server.blobs[about["oid"]]
        commit = self.server.add(name, files)
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit})


_ROUTES = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", lambda self: self.answer({"errors": [], "warnings": []})),
    (r"/api/models/([^/]+/[^/]+)", _Handler.info),
    (r"/api/models/([^/]+/[^/]+)/revision/(.+)", _Handler.info),
    (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    (r"/api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.commit),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/lfs/(\w+)", _Handler.upload),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def hub_server():
    """Serve until the block ends."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(server, home, token=TOKEN):
    """What a process needs to take the server for the hub, with a cache of its own."""
    known = {} if token is None else {"HF_TOKEN": token}
    return known | {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def use_server(monkeypatch, server, home, token=TOKEN):
    """Let this process take the server for the hub: the client has read its environment long ago."""
    from huggingface_hub import constants, hf_api, utils

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(server, home, token).items():
        monkeypatch.setenv(name, value)
    values = {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.address)  # of the functions that diffusers imports
    utils.close_session()  # it knows the proxies of before
