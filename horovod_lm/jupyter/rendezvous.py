"""Where the live ranks of one generation meet, and which engine is which rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import psutil
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.common.util.network import find_port
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import (
    RendezvousHandler,
    RendezvousHTTPServer,
    RendezvousServer,
)
from horovod.runner.util.threads import in_thread

SECONDS_GLOO_WAITS = 6  # Horovod: for a rank whose host does not answer any more
LOOPBACK = "127.0.0.1"


class Rendezvous(RendezvousServer):
    """A meeting point for ranks that are about to start; each generation needs a fresh one.

    Args:
        host_names: of each engine.
        address: this host's, as the ranks reach it. Nothing listens anywhere else: whoever can
            reach a rendezvous can join it.
        stall: seconds after which ranks that wait for one another are freed; 0: never.
        interface: the network interface that ranks talk over; empty: Horovod's choice.
    Attributes:
        order: the engines, by their place in `host_names`, in the order of ranks.
        settings: each rank's environment variables, by rank.
    """

    def __init__(
        self,
        host_names: Sequence[str],
        address: str = LOOPBACK,
        stall: int = 6,
        interface: str = "",
    ) -> None:
        super().__init__(0)
        self._address = address
        slots = Counter(host_names)  # in the order in which hosts are first named
        plan = get_host_assignments(
            parse_hosts(",".join(f"{name}:{count}" for name, count in slots.items())),
            len(host_names),
        )
        self.order = sorted(
            range(len(host_names)), key=lambda engine: list(slots).index(host_names[engine])
        )
        port = self.start(RendezvousHandler)
        self.init(plan)
        common = {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(SECONDS_GLOO_WAITS),
            **stall_settings(stall),
        }
        if interface or address == LOOPBACK:
            common["HOROVOD_GLOO_IFACE"] = interface or _loopback()
        self.settings = [{**common, **create_slot_env_vars(slot)} for slot in plan]

    def start(self, handler_cls: type) -> int:
        """Listen, on one address instead of on all; return the port."""
        self._httpd, port = find_port(
            lambda any_address: RendezvousHTTPServer(
                (self._address, any_address[1]), handler_cls, self._verbose
            )
        )
        self._listen_thread = in_thread(target=self._httpd.serve_forever)
        return port

    def close(self) -> None:
        """Stop listening, and give the port back."""
        self.stop()
        self._httpd.server_close()


def stall_settings(stall: int) -> dict[str, str]:
    """Return the environment variables that free ranks which wait for one another.

    Args:
        stall: after so many seconds; 0: never.
    """
    return {
        # Horovod: it looks once in every period of its warning.
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, stall // 3)),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(stall),
    }


def _loopback() -> str:
    """Return the name of the interface that only this host reaches."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    return ""
