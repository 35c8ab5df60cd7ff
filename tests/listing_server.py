"""A server that speaks ListObjectsV2 alone, over as many keys as one likes under one flat prefix.

    python tests/listing_server.py --keys 1000000 --latency-ms 50

Prints its URL. `/stats` tells how many list requests there were and how many at a time. Keys are
computed from their number, so that a million of them take no memory.
"""

import argparse
import bisect
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, urlsplit

PREFIX = "flat/"


def key_of(number: int) -> str:
    """The key with this number; their order is that of the numbers."""
    return f"{PREFIX}img_{number:08d}.jpg"


class _Keys:
    """All keys as a sorted sequence that is computed when looked at."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> str:
        return key_of(number)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int, keys: int, latency_s: float) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.keys, self.latency_s = _Keys(keys), latency_s
        self.lock = threading.Lock()
        self.n_requests = self.in_flight = self.most_in_flight = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        server = self.server
        if url.path == "/stats":
            self._answer(
                json.dumps(
                    {"n_requests": server.n_requests, "most_in_flight": server.most_in_flight}
                )
            )
            return
        with server.lock:
            server.n_requests += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        time.sleep(server.latency_s)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        self._answer(_page(server.keys, asked))
        with server.lock:
            server.in_flight -= 1

    def _answer(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _page(keys: _Keys, asked: dict[str, str]) -> str:
    after = asked.get("continuation-token") or asked.get("start-after", "")
    prefix = asked.get("prefix", "")
    first = max(bisect.bisect_right(keys, after), bisect.bisect_left(keys, prefix))
    last = bisect.bisect_left(keys, prefix + "\U0010ffff")
    stop = min(last, first + min(1000, int(asked.get("max-keys", 1000))))
    contents = "".join(
        f"<Contents><Key>{quote(key_of(i))}</Key>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{i:032x}&quot;</ETag><Size>{1000 + i % 1000}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for i in range(first, stop)
    )
    more = stop < last
    token = f"<NextContinuationToken>{key_of(stop - 1)}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
        f"<Prefix>{quote(prefix)}</Prefix><EncodingType>url</EncodingType>"
        f"<KeyCount>{stop - first}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    listening = _Server(options.port, options.keys, options.latency_ms / 1000)
    print(f"http://127.0.0.1:{listening.server_port}", flush=True)
    listening.serve_forever()
