"""The rendezvous server of live ranks, and the settings that each of them starts with."""

from __future__ import annotations

import threading

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from horovod_lm.jupyter.run_cell.horovodrun_job import stall_settings
from horovod_lm.launch.elastic_hosts import LOOPBACK, loopback_interface

GLOO_TIMEOUT_SECONDS = 6  # how long Gloo waits for a rank that does not answer


class Rendezvous:
    """Where ranks on this host find each other when they start; each start needs a new one.

    Args:
        size: the number of ranks.
        stall: seconds after which ranks that wait for one another are freed; 0: never.

    Attributes:
        settings: each rank's environment variables, by rank.
    """

    def __init__(self, size: int, stall: int) -> None:
        slots = get_host_assignments(parse_hosts(f"localhost:{size}"), size)
        # Not Horovod's RendezvousServer, which listens on every interface: whoever can connect can
        # join.
        self._server = RendezvousHTTPServer((LOOPBACK, 0), RendezvousHandler, 0)
        self._server.init(slots)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        common = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(self._server.server_address[1]),
            "HOROVOD_GLOO_IFACE": loopback_interface(),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            **stall_settings(stall, GLOO_TIMEOUT_SECONDS, longest_period=2),
        }
        self.settings = [{**common, **create_slot_env_vars(slot)} for slot in slots]

    def close(self) -> None:
        """Stop listening, and release the port."""
        self._server.shutdown()
        self._server.server_close()
