"""A Hub of one process for tests: what the real client needs to create, upload and download.

In memory, no authentication beyond asking for a token, one revision. A test that passes against it
shows that the client accepts what we hand it, not what the real Hub would say.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server on a free port of this machine; a context manager.

    repos: the files of each model. sent: path and bytes of every answer from a file of theirs.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.lfs: dict[str, bytes] = {}
        self.sent: list[tuple[str, int]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache):
        """What points the client here, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "any",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if path == "api/whoami-v2":
            return self._json({"type": "user", "name": "me", "orgs": []})
        if parts[:2] == ["api", "models"]:
            files = self.hub.repos.get("/".join(parts[2:4]))
            if files is None:
                return self._missing("RepoNotFound")
            if len(parts) > 4 and parts[4] == "tree":
                return self._json([self._entry(name, data) for name, data in files.items()])
            return self._json(
                {
                    "id": "/".join(parts[2:4]),
                    "sha": _COMMIT,
                    "private": False,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in files],
                }
            )
        if len(parts) > 4 and parts[2] == "resolve":
            data = self.hub.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if data is None:
                return self._missing("EntryNotFound")
            return self._file(path, data)
        return self._missing("NotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self._body()
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self.headers.get("Authorization"):
            return self._answer(401, b"", {})
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(name, {})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})
        if path.endswith("info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        parts = path.split("/")
        files = self.hub.repos.get("/".join(parts[2:4]))
        if files is None:
            return self._missing("RepoNotFound")
        if parts[4] == "preupload":
            return self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": self._mode(file["path"]),
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{_COMMIT}"
        return self._json({"success": True, "commitOid": _COMMIT, "commitUrl": url})

    def do_PUT(self):
        data = self._body()
        sha = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(data).hexdigest() != sha:
            return self._answer(400, b"", {})
        self.hub.lfs[sha] = data
        return self._answer(200, b"", {})

    def _file(self, path, data):
        """Answer with a file, or the part of it that is asked for."""
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": _COMMIT,
            "Accept-Ranges": "bytes",
        }
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first > last:
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        if self.command != "HEAD":
            self.hub.sent.append((path, len(data)))
        return self._answer(status, data, headers)

    @staticmethod
    def _mode(path):
        return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

    def _entry(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
        if self._mode(name) == "lfs":
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
        return entry

    def _body(self):
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code):
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status, data, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
