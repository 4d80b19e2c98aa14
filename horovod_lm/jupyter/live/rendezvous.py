"""The rendezvous server of live ranks, and the settings that each of them starts with."""

from __future__ import annotations

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.common.util.network import find_port
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import (
    RendezvousHandler,
    RendezvousHTTPServer,
    RendezvousServer,
)
from horovod.runner.util.threads import in_thread

from horovod_lm.launch.elastic_hosts import LOOPBACK, loopback_interface

GLOO_TIMEOUT_SECONDS = 6  # how long Gloo waits for a rank that does not answer


class Rendezvous(RendezvousServer):
    """Where ranks on this host find each other when they start; each start needs a new one.

    Args:
        size: the number of ranks.
        stall: seconds after which ranks that wait for one another are freed; 0: never.

    Attributes:
        settings: each rank's environment variables, by rank.
    """

    def __init__(self, size: int, stall: int = 6) -> None:
        super().__init__(0)
        slots = get_host_assignments(parse_hosts(f"localhost:{size}"), size)
        port = self.start(RendezvousHandler)
        self.init(slots)
        common = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_GLOO_IFACE": loopback_interface(),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(GLOO_TIMEOUT_SECONDS),
            # Horovod: it looks once in each warning period.
            "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, stall // 3)),
            "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(stall),
        }
        self.settings = [{**common, **create_slot_env_vars(slot)} for slot in slots]

    def start(self, handler_cls: type) -> int:
        """Listen on the loopback address only, since anyone who can connect can join."""
        self._httpd, port = find_port(
            lambda any_address: RendezvousHTTPServer(
                (LOOPBACK, any_address[1]), handler_cls, self._verbose
            )
        )
        self._listen_thread = in_thread(target=self._httpd.serve_forever)
        return port

    def close(self) -> None:
        """Stop listening, and release the port."""
        self.stop()
        self._httpd.server_close()
