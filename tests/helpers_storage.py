"""An S3-compatible server on a real port, and what lies in it."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A running server with one empty bucket; yields the environment variables that lead to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")):
            pass
        yield {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
    finally:
        server.stop()


def raw(address: str) -> Any:
    """An obstore store at an address, for a test to look and meddle behind a storage's back."""
    from obstore.store import S3Store

    return S3Store.from_url(address)


def objects(address: str) -> dict[str, bytes]:
    """Every object below an address with its bytes, but journal and lock."""
    import obstore

    store = raw(address)
    names = [known["path"] for page in obstore.list(store) for known in page]
    kept = (name for name in names if name != "lock" and not name.startswith("journal/"))
    return {name: bytes(obstore.get(store, name).bytes()) for name in kept}


def put(address: str, name: str, content: bytes) -> None:
    """Put an object behind a storage's back."""
    import obstore

    obstore.put(raw(address), name, content)


def pending_uploads(bucket: str = BUCKET) -> int:
    """Multipart uploads that were begun and neither completed nor aborted."""
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}?uploads") as answer:
        return int(answer.read().count(b"<UploadId>"))
