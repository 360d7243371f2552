"""A local stand-in for the Hugging Face hub: real HTTP, files from folders, as much as a download asks for.

    with Hub({"models/org/name": folder, "datasets/org/name": other_folder}) as hub:
        subprocess.run([HF, "download", "org/name", "--local-dir", out], env=hub.environment(cache))

`hf download` (huggingface_hub 2.4) asks three things of it: the repository's commit and files, the files'
sizes (the tree), and each file under its commit, by HEAD and then GET. `hub.requests` keeps what was asked.
"""
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves {"models/org/name" or "datasets/org/name": folder} under the branch `main` on 127.0.0.1."""

    def __init__(self, repositories: dict[str, Path], revisions=("main",)):
        self.repositories = {name: Path(folder) for name, folder in repositories.items()}
        self.revisions = revisions
        self.requests: list[str] = []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.requests.append(f"{self.command} {self.path}")
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """The shell's environment with this hub in the place of the real one, and a cache of its own."""
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def answer(self, request) -> None:
        path = unquote(urlsplit(request.path).path)
        asked = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if asked:
            kind, name, what, revision = asked.groups()
        else:
            asked = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not asked:
                return reply(request, 404, b"{}")
            kind, name, revision, file = (asked[1] or "models/")[:-1], asked[2], asked[3], asked[4]
            what = "file"
        folder = self.repositories.get(f"{kind}/{name}")
        if folder is None:
            return reply(request, 404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
        commit = hashlib.sha1("\n".join(files).encode()).hexdigest()
        if revision in self.revisions and re.fullmatch("[0-9a-f]{40}", revision):    # asked for by its hash
            commit = revision
        if revision not in (None, commit, *self.revisions):
            return reply(request, 404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        if what == "file":
            if file not in files:
                return reply(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = files[file].read_bytes()
            return reply(request, 200, content, {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"',
                                                 "Accept-Ranges": "bytes"})
        if what == "tree":
            answer = [{"type": "file", "path": path, "size": f.stat().st_size,
                       "oid": blob_id(f.read_bytes())} for path, f in files.items()]
        else:
            answer = {"id": name, "sha": commit, "private": False, "gated": False, "tags": [],
                      "downloads": 0, "siblings": [{"rfilename": path} for path in files]}
        return reply(request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def reply(request, status: int, content: bytes, headers: dict[str, str] = {}) -> None:
    begin = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if status == 200 else None
    request.send_response(206 if begin else status)
    if begin:
        first, last = int(begin[1]), int(begin[2] or len(content) - 1)
        request.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        content = content[first:last + 1]
    for key, value in headers.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)


def blob_id(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
