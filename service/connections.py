"""Limits on connections that uvicorn itself does not have: time to send a request, and room for clients that do."""

import asyncio
import collections
from typing import Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.guard import MAX_BODY

MAX_CONNECTIONS = 200  # some systems allow a process 256 open files
HEADER_SECONDS = 10
REQUEST_SECONDS = 20  # for a whole request, and 1 s more for every BODY_RATE bytes that arrived
BODY_RATE = 2**17
BLOCKED_SECONDS = 25  # for which a client may refuse to take its answer


class Connection(H11Protocol):
    """A connection that is closed if its client is slow, or idle while others want its place."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note the time; close the connection that has been idle longest if there are too many."""
        super().connection_made(transport)
        self.received, self.since = 0, self.loop.time()
        self.blocked: Optional[float] = None
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.is_waiting()]
            counts = collections.Counter(one.client and one.client[0] for one in idle)
            self.drop(max(idle, key=lambda one: (counts[one.client and one.client[0]], -one.since), default=self))

    def is_waiting(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.received, self.since = 0, self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.blocked = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.blocked = None
        super().resume_writing()

    def check_time(self) -> None:
        """Close the connection if its client is too slow; called every second."""
        waited = self.loop.time() - self.since
        allowed = HEADER_SECONDS if self.conn.their_state is h11.IDLE else REQUEST_SECONDS + self.received / BODY_RATE
        late = self.is_waiting() and (waited > allowed or self.received > 2 * MAX_BODY)
        if late or (self.blocked is not None and self.loop.time() - self.blocked > BLOCKED_SECONDS):
            self.drop(self)

    @staticmethod
    def drop(connection: "Connection") -> None:
        connection.connections.discard(connection)
        connection.transport.abort()
