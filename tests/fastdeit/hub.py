"""Stand-ins of the hub, for the tests of published weights: its cache on disk, and a server on this machine."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import timm
from safetensors.torch import save_file

from .written import lively

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repository: str) -> Path:
    """The folder of a repository in the hub's cache, as a download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    return folder / "snapshots" / COMMIT


def publish(cache: Path, name: str):
    """Weights of timm's model `name` where its download would have put them; returns the model."""
    model = lively(timm.create_model(name))
    folder = cached(cache, timm.get_pretrained_cfg(name).hf_hub_id)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


class Server:
    """Serves the files in `folder` by their paths, under /ORG/NAME/resolve/REVISION/FILE as the hub does."""

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(False)

            def do_GET(self):
                server.asked.append(self.path)
                self.answer(True)

            def answer(self, body: bool):
                repository, _, file = self.path.partition("/resolve/main/")
                path = folder / repository.lstrip("/") / file
                if not path.is_file():
                    self.send_response(404)
                    missing = "EntryNotFound" if path.parent.is_dir() else "RepoNotFound"
                    self.send_header("X-Error-Code", missing)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
