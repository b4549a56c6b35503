"""A real S3 API on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def s3_server(**environ: str) -> Iterator[str]:
    """Its address, with credentials for it in the environment. environ: more of that; `{url}` stands for the address."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name, value in environ.items():
            patch.setenv(name, value.format(url=url))
        yield url
        # Buckets outlive their server: another one in this process would find them.
        urlopen(Request(f"{url}/moto-api/reset", method="POST"), timeout=10).close()
    server.stop()
