"""A hub on this machine: it answers over HTTP as huggingface.co does, as far as data sets need.

Tests that need other answers give a Handler of their own to the fixture hub_answers.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 39 + "1"
REPO = re.compile(r"(/api)?/datasets/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?(?:/(.*))?")


class Hub(ThreadingHTTPServer):
    """folder/OWNER/NAME/... are its files; gated: id -> 401 or 403, all that is asked of its files.

    fetched: (repository, path in it, bytes sent) of every answer that holds a file's content
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.gated = {}
        self.fetched = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Answer(Handler):
    def do_GET(self):
        match = REPO.fullmatch(unquote(urlsplit(self.path).path))
        if not match:
            return self.refuse(404, "NotFound")
        api, repo, what, _, path = match.groups()
        root = self.server.folder / repo
        if not root.is_dir():
            return self.refuse(401, "RepoNotFound")
        if repo in self.server.gated and what in ("resolve", "auth-check"):
            return self.refuse(self.server.gated[repo], "GatedRepo")
        if what == "resolve":
            return self.file(root / path, repo, path)
        files = [file for file in sorted((root / (path or "")).rglob("*"))
                 if what != "tree" or "recursive=true" in self.path.lower()
                 or file.parent == root / (path or "")]
        if what == "tree":
            return self.json([self.entry(root, file) for file in files])
        if what == "paths-info":
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            names = json.loads(form)["paths"] if form[0] == "{" else parse_qs(form)["paths"]
            return self.json([self.entry(root, root / name) for name in names
                              if (root / name).exists()])
        self.json({"id": repo, "sha": COMMIT, "gated": "auto" if repo in self.server.gated else
                   False, "siblings": [{"rfilename": str(file.relative_to(root))}
                                       for file in files if file.is_file()]})

    do_HEAD = do_POST = do_GET

    def entry(self, root: Path, file: Path) -> dict:
        name = file.relative_to(root).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}

    def file(self, file: Path, repo: str, name: str):
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        content = file.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = 0, len(content)
        if part:
            start, end = int(part[1]), int(part[2] or len(content) - 1) + 1
        body = content[start:end]
        self.send_response(206 if part else 200)
        for key, value in {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT,
                           "Accept-Ranges": "bytes", "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self.server.fetched.append((repo, name, len(body)))
            self.wfile.write(body)

    def json(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def serving(folder: Path):
    return running(Hub(folder))


@contextmanager
def running(server: ThreadingHTTPServer):
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask_hub(server: Hub, home: Path, code: str, offline: bool = False) -> dict[str, str]:
    """What a program prints after a word that begins a line, in a process of its own: {word: rest},
    the rests of several such lines one below another.

    home: the HF_HOME in which it finds what earlier ones fetched
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True,
                         capture_output=True, env=env)
    assert out.returncode == 0, out.stderr
    said = {}
    for word, _, rest in (line.partition(" ") for line in out.stdout.splitlines()):
        said[word] = f"{said[word]}\n{rest}" if word in said else rest
    return said
