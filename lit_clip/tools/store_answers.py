"""Answers of web servers, as fsspec reads them: never unpacked, and never held beyond a bound."""

import re
from typing import Any

import aiohttp

from lit_clip.errors import AnswerTooLargeError, require
from lit_clip.tools.untrusted import shortened

MOST = 64 << 20  # bytes of an answer that is held whole, such as a listing or an index; parts have the size asked for
CHUNK = 1 << 20  # bytes


class BoundedAnswer(aiohttp.ClientResponse):
    """An answer that is refused if it is compressed, or larger than what was asked for."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        encoding = self.headers.get("Content-Encoding", "").strip()
        plain = self.status >= 300 or encoding.lower() in ("", "identity")  # of others nothing is read
        require(plain, f"the server sends it compressed ({shortened(encoding)}); have it sent as it is")
        return self

    async def read(self) -> bytes:
        if self._body is None and self.status < 300:
            try:
                self._body = await self._bounded()
            except BaseException:
                self.close()
                raise
        return await super().read()

    async def _bounded(self) -> bytes:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        most = int(part[2]) - int(part[1]) + 1 if part else MOST
        chunks, size = [], 0
        while chunk := await self.content.read(CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                chunks.clear()  # which the error's traceback would keep
                raise AnswerTooLargeError(f"the server sends more than {most:,} bytes")
        return b"".join(chunks)


def client_options(silence: float) -> dict[str, Any]:
    """Return options of fsspec's web store; a server that sends nothing for ``silence`` seconds does not answer."""
    # aiohttp's own limit is on the whole transfer, and a shard may take longer than that
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
    headers = {"Accept-Encoding": "identity"}
    return {"timeout": timeout, "headers": headers, "auto_decompress": False, "response_class": BoundedAnswer}
