"""Latent stores behind a network protocol: a server of WebHDFS, and of plain HTTP with ranges, on loopback."""
import functools
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from lightningdit import remote
from lightningdit.latents import LatentStore, Writer, make_plan, spans


class Handler(BaseHTTPRequestHandler):
    """Files of a folder, by the two operations of WebHDFS that reading needs, or by GET with a Range; counts the bytes it sends."""

    def __init__(self, server, *arguments):
        self.about = server
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        file = self.about.folder / address.path.rsplit("/", 1)[1]
        if not file.is_file():
            return self.answer(404, json.dumps(dict(RemoteException=dict(exception="FileNotFoundException", message=file.name))).encode())
        content = file.read_bytes()
        if query.get("op") == "GETFILESTATUS":
            return self.answer(200, json.dumps(dict(FileStatus=dict(length=len(content), type="FILE", pathSuffix=""))).encode())
        start, stop = 0, len(content)
        if query.get("op") == "OPEN":
            start = int(query["offset"])
            stop = start + int(query["length"])
        elif wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), int(last) + 1
        self.about.sent.append((file.name, len(content[start:stop])))
        self.answer(206 if self.headers.get("Range") else 200, content[start:stop])

    def answer(self, code, content):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """A store of 25 images in 4 shards, a server of it, and the bytes that it sent."""
    folder, n = tmp_path / "store", 25
    moments = torch.randn(n, 2, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    plan = make_plan(types.SimpleNamespace(classes=["a", "b"], fingerprint="test"), n, shape=(3, 2, 4), views=2, dtype="fp32",
                     shards=spans(n, 7))
    writer = Writer(folder, plan)
    for number, (start, stop) in enumerate(plan["shards"]):
        writer.write(number, moments[start:stop], torch.arange(start, stop) % 2, torch.arange(start, stop))
    writer.finish(dict(tokenizer=None, mean=None, std=None))
    about = types.SimpleNamespace(folder=folder, sent=[], moments=moments)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, about))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    about.port = server.server_address[1]
    yield about
    server.shutdown()
    server.server_close()


def address(about, protocol="webhdfs"):
    return f"{protocol}://127.0.0.1:{about.port}/data/store"


@pytest.mark.parametrize("protocol", [
    "webhdfs", pytest.param("http", marks=pytest.mark.skipif(find_spec("aiohttp") is None, reason="fsspec's http needs aiohttp"))])
def test_a_remote_store_is_copied_once_and_is_the_same(served, tmp_path, protocol):
    path = remote.fetch_store(address(served, protocol), tmp_path / "cache", progress=False)
    store = LatentStore(path, verify=True)
    assert torch.equal(store.gather(torch.arange(25)), served.moments[:, 0])
    assert sum(size for name, size in served.sent if name.startswith("shard")) == sum(a["size"] for a in store.index["shards"])
    served.sent.clear()
    assert remote.fetch_store(address(served, protocol), tmp_path / "cache", progress=False) == path
    assert {name for name, _ in served.sent} == {"index.json"}
    assert remote.read_index(address(served, protocol)) == store.index


def test_an_interrupted_copy_goes_on_with_what_is_missing(served, tmp_path):
    last = served.folder / "shard_00003.safetensors"
    held = last.read_bytes()
    last.unlink()
    with pytest.raises(OSError, match="could not read .*shard_00003"):
        remote.fetch_store(address(served), tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*/index.json"))  # not a store yet
    last.write_bytes(held)
    served.sent.clear()
    LatentStore(remote.fetch_store(address(served), tmp_path / "cache", progress=False), verify=True)
    assert {name for name, _ in served.sent} == {"index.json", last.name}


@pytest.mark.parametrize("name", ["shard_00001.safetensors", "index.json"])
@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]], ids=["truncated", "flipped"])
def test_damage_on_the_way_is_refused(served, tmp_path, name, damage):
    file = served.folder / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        remote.fetch_store(address(served), tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*/index.json"))


def test_nothing_there(served, tmp_path):
    with pytest.raises(OSError, match="could not read"):
        remote.fetch_store("webhdfs://127.0.0.1:9/store", tmp_path / "cache", progress=False)
    with pytest.raises(OSError, match="index.json"):
        (served.folder / "index.json").unlink()
        remote.fetch_store(address(served), tmp_path / "cache", progress=False)
