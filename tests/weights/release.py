"""A release on the loopback interface that can be faulty."""

import hashlib
import io
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from bcos_train import create_model
from bcos_train.weights import ZooRecord, download, records

#: What the server does to a request, besides sending the file: an HTTP status, or one of the words in ``_misbehave``.
Fault = int | str | None


@dataclass
class Release:
    """Files by name, what happens to the requests to come, and those that have come as (path, first byte)."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, int]] = field(default_factory=list)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    release: Release

    def do_GET(self) -> None:
        release, asked = self.release, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        release.requests.append((self.path, begin))
        fault = release.faults.pop(0) if release.faults else None
        body = release.files.get(self.path.lstrip("/"))
        if isinstance(fault, int) or body is None:
            self.send_error(404 if body is None else fault)
        elif asked and begin >= len(body):
            self.send_error(416)
        elif fault == "reset":
            self._reset()
        else:
            self._send(body, 0 if fault == "no ranges" else begin, fault)

    def _send(self, body: bytes, begin: int, fault: Fault) -> None:
        is_part = "Range" in self.headers and fault != "no ranges"
        self.send_response(206 if is_part else 200)
        if is_part:
            first = begin + (fault == "another part")
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        rest = body[begin:]
        half = len(rest) // 2
        self.wfile.write(rest[:half] if fault in ("cut", "reset within", "stall") else rest)
        if fault == "reset within":
            self._reset()
        if fault == "stall":
            threading.Event().wait(1)

    def _reset(self) -> None:
        self.wfile.flush()
        # Closing with this option on sends a reset instead of the usual end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        if self.connection.fileno() != -1:
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def shutdown_request(self, request: Any) -> None:
        if request.fileno() != -1:
            super().shutdown_request(request)


@contextmanager
def serving(release: Release) -> Iterator[Release]:
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"release": release}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    release.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield release
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def state_of(name: str, **options: Any) -> dict[str, Tensor]:
    """Random weights of a model."""
    torch.manual_seed(7)
    return dict(create_model(name, **options).state_dict())


def as_file(state: dict[str, Tensor], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> ZooRecord:
    """Make ``content`` the official file of a row."""
    digest = hashlib.sha256(content).hexdigest()
    row = ZooRecord(name, "bcos_final", name, f"{name}-{digest[:10]}.pth", 0.0, 0.0, 0.0, 0, 0)
    monkeypatch.setattr(records, "RECORDS", MappingProxyType({**records.RECORDS, name: row}))
    return row


def use(monkeypatch: pytest.MonkeyPatch, address: str, home: Path) -> None:
    """Take the release from ``address`` and keep files under ``home``; wait for nothing."""
    monkeypatch.setattr(records, "RELEASE", address)
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(download.MIRROR, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
