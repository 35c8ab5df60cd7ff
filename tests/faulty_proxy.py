"""A proxy before an S3 server that answers some reads of objects as a busy network would.

    python tests/faulty_proxy.py http://127.0.0.1:5000 --seed 3

Prints its URL. Only GETs of objects are disturbed: 503 SlowDown, a connection reset in the middle
of the body, a slow answer. `/-/stats` tells how many of each there were.
"""

import argparse
import asyncio
import random
import socket
import struct
from typing import Any

from aiohttp import ClientSession, TCPConnector, web
from yarl import URL

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
SLOW_DOWN = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    "<Message>Please reduce your request rate.</Message></Error>"
)


class Proxy:
    """Passes requests on, disturbing the shares it was given."""

    def __init__(self, session: ClientSession, options: argparse.Namespace) -> None:
        self.session, self.options = session, options
        self.random = random.Random(options.seed)
        self.counts = {"slowdown": 0, "reset": 0, "slow": 0, "ok": 0}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request."""
        if request.path == "/-/stats":
            return web.json_response(self.counts)
        fault = ""
        if request.method == "GET" and len(request.path.strip("/").split("/")) > 1:
            fault = self._draw()
            self.counts[fault or "ok"] += 1
        if fault == "slowdown":
            return web.Response(status=503, text=SLOW_DOWN, content_type="application/xml")
        if fault == "slow":
            await asyncio.sleep(self.options.slow_s)
        passed = dict(request.headers)
        if passed.pop("Expect", None) and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        url = URL(self.options.upstream + request.raw_path, encoded=True)
        async with self.session.request(
            request.method, url, headers=passed, data=await request.read()
        ) as answer:
            body = await answer.read()
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
            if request.method == "HEAD":
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            if fault == "reset":
                return await self._cut_short(request, answer.status, headers, body)
            return web.Response(status=answer.status, headers=headers, body=body)

    def _draw(self) -> str:
        drawn = self.random.random()
        for fault in ("slowdown", "reset", "slow"):
            drawn -= getattr(self.options, fault)
            if drawn < 0:
                return fault
        return ""

    async def _cut_short(
        self, request: web.BaseRequest, status: int, headers: dict[str, str], body: bytes
    ) -> web.StreamResponse:
        answer = web.StreamResponse(status=status, headers=headers)
        answer.content_length = len(body)
        await answer.prepare(request)
        await answer.write(body[: len(body) // 2])
        transport: Any = request.transport
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        transport.abort()
        return answer


def main() -> None:
    """Listen until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("--slowdown", type=float, default=0.05)
    parser.add_argument("--reset", type=float, default=0.01)
    parser.add_argument("--slow", type=float, default=0.01)
    parser.add_argument("--slow-s", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    async def serve() -> None:
        session = ClientSession(
            connector=TCPConnector(limit=64), auto_decompress=False, skip_auto_headers=["Accept"]
        )
        # Without routes, which do not match a line break in a path.
        runner = web.ServerRunner(web.Server(Proxy(session, options).handle))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        print(f"http://{host}:{port}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
