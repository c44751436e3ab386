"""A Hub with one data set, on loopback, as huggingface_hub and `datasets` ask it; and what a process makes of it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
ROWS = [{"prompt": f"{number}? ", "completion": "yes"} for number in range(3)]
CARD = """---
configs:
- config_name: short
  data_files: [{split: train, path: short/train.jsonl}, {split: test, path: short/test.jsonl}]
- config_name: long
  data_files: [{split: train, path: long.jsonl}]
---
"""
FILES = {
    "README.md": CARD.encode(),
    "short/train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "short/test.jsonl": json.dumps(ROWS[0]).encode(),
    "long.jsonl": json.dumps({"prompt": "a", "completion": "b"}).encode(),
}
NAME = "org/talks"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        api, file = f"/api/datasets/{NAME}", re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.*)", path)
        if re.fullmatch(rf"{api}(/revision/(v1|main|{COMMIT}))?", path):
            self._answer(200, {"id": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif tree := re.fullmatch(rf"{api}/tree/[^/]+/?(.*)", path):
            self._answer(200, _tree(tree[1], deep="recursive=true" in self.path.lower()))
        elif re.fullmatch(rf"{api}/paths-info/[^/]+", path):
            self._answer(200, [_entry(name) for name in FILES])
        elif file and file[1] in FILES:
            self._answer(200, FILES[file[1]], ETag=f'"{_entry(file[1])["oid"]}"', **{"X-Repo-Commit": COMMIT})
        else:
            self._answer(404, {"error": "no"}, **{"X-Error-Code": "EntryNotFound" if file else "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str) -> dict[str, object]:
    data = FILES[name]
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def _tree(below: str, *, deep: bool) -> list[dict[str, object]]:
    start = f"{below}/" if below else ""
    inside = [name for name in FILES if name.startswith(start)]
    folders = {start + name.removeprefix(start).split("/")[0] for name in inside if "/" in name.removeprefix(start)}
    files = [_entry(name) for name in inside if deep or "/" not in name.removeprefix(start)]
    return [*files, *({"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in sorted(folders))]


@contextmanager
def serving() -> Iterator[str]:
    """The address of the Hub, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Fetch each source named on the command line; print what became of it as JSON, a line each."""
    from formats.errors import UserError
    from trainer.data import hub
    from trainer.data.chat.sources import Source, splits_of

    for source in sys.argv[2:]:
        try:
            path = hub.local_path(source, sys.argv[1])
        except UserError as error:
            print(json.dumps({"refused": str(error)}))
            continue
        splits = {split: [record.fields() for record in Source(path, split).records()] for split in splits_of(path)}
        print(json.dumps({"name": path.name, "splits": splits, "about": json.loads((path / hub.METADATA_FILE).read_text())}))


if __name__ == "__main__":
    main()
