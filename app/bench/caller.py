"""A client in a process of its own, so that it shares neither interpreter lock nor event loop with the server it times.

Reads JSON lines from stdin: first the server's address, then a request body each, and answers each on stdout with the seconds it took.
Ends when stdin does. Run by file, isolated: it knows nothing of this package and imports only what a request needs.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from typing import Any


def main() -> int:
    """0 when nobody asks any more, 1 after telling what went wrong."""
    where = json.loads(sys.stdin.readline() or "null")
    if where is None:
        return 0
    connection = http.client.HTTPConnection(where["host"], where["port"], timeout=where["timeout_s"])
    headers = {"Content-Type": "application/json", **where["headers"]}
    for line in sys.stdin:
        try:
            tell(ask(connection, where["path"], json.loads(line), headers))
        except (OSError, http.client.HTTPException, ValueError) as error:
            tell({"fault": f"{type(error).__name__}: {error}"})
            return 1
    return 0


def ask(connection: http.client.HTTPConnection, path: str, body: Any, headers: dict[str, str]) -> dict[str, Any]:
    """One request on the connection that is kept; the seconds are those from the object to send to the object received."""
    if connection.sock is None:  # a connection is no part of a request
        connection.connect()
    began = time.perf_counter()
    connection.request("POST", path, json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    return {"seconds": time.perf_counter() - began, "status": answer.status, "body": told}


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
