"""Train on a Ray cluster: Ray places the ranks on its nodes, Horovod's rendezvous connects them.

    ray job submit -- python "$PWD/configs/jobs/ray_job.py" --ranks 8 --gpus 1 --run-name big
    ray job submit -- python "$PWD/configs/jobs/ray_job.py" --ranks 2 --config configs/tiny.yaml

The other arguments go to `python -m horovod_lm.train`. Submitted again, the job resumes its run
from the newest checkpoint. After `ray job stop`, Ctrl-C or the loss of a rank, the other ranks save
a checkpoint and end. The job ends before them, and Ray does not limit their time: on a disk without
locks, let them end before you submit again. Their last lines are in Ray's log of the task "rank 0".

Every node needs this project and its environment in the same folder, and a disk that the nodes
share for `runs/`. Ray starts the ranks: `distributed.hosts` and `distributed.environment` are not
used. Do not give `--working-dir`, with which the run would be in Ray's copy of the project.

What of it was run: on two hosts made of network namespaces, a tiny model without GPUs, on Ray 2.60:
a job that is stopped, one in which a rank is killed, and one that ends, which together give the
losses and parameters of `horovodrun -np 2` to the last bit; and one too large for the cluster. Not
run: GPUs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import ray
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousServer
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from horovod_lm.utils.errors import how_it_ended
from horovod_lm.utils.machine import interface_of

PROJECT = Path(__file__).resolve().parents[2]
# Ray kills the child processes of a worker that ends; the ranks are to get SIGTERM instead.
LET_RANKS_SAVE = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}
# The kernel sends this signal when each thread of the parent ends, and a rank does not save after a
# second SIGTERM: the parent is a shell, which has one thread, and is killed with the worker.
SIGTERM_WITH_WORKER = ["setpriv", "--pdeathsig", "KILL", "sh", "-c"]
SIGTERM_WITH_WORKER += ['setpriv --pdeathsig TERM "$@"; exit $?', "sh"]
SECONDS_AFTER_FAILURE = 30  # for the other ranks to notice it and to save
AGAIN = "the same job resumes when it is submitted again"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train on a Ray cluster.")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each rank: 0 (default) or 1")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each rank (default: 1)")
    parser.add_argument("--run-name", default="ray", help="the run's folder under runs/")
    parser.add_argument("--wait", type=int, default=20, help="seconds for room (default: 20)")
    given, others = parser.parse_known_args()
    if "runtime_resources" in PROJECT.parts:
        sys.exit("error: leave out --working-dir, and give the path of this file in the project")
    try:
        ray.init(address="auto")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's handler aborts
        group = place(given.ranks, {"CPU": given.cpus, "GPU": given.gpus}, given.wait)
        train = [sys.executable, "-m", "horovod_lm.train", "--config", "configs/cluster.yaml"]
        run(group, [*train, "--run-name", given.run_name, "--resume", "auto", *others])
    except ConnectionError:
        sys.exit("error: no Ray cluster runs on this machine: start one with `ray start --head`")
    except KeyboardInterrupt:
        sys.exit(f"stopped: the ranks save and end; {AGAIN}")


def place(ranks: int, resources: dict[str, int], seconds: int) -> PlacementGroup:
    """Reserve the resources of all ranks, on as few nodes as possible."""
    bundle = {kind: amount for kind, amount in resources.items() if amount}
    group = placement_group([bundle] * ranks, strategy="PACK")
    if group.wait(seconds):
        return group
    each, there, free = (
        " and ".join(f"{amounts.get(kind, 0):g} {kind}s" for kind in resources)
        for amounts in (resources, ray.cluster_resources(), ray.available_resources())
    )
    sys.exit(
        f"error: there was no room for {ranks} ranks with {each} each within {seconds} s: the"
        f" cluster has {there}, and {free} are free; ask for fewer --ranks, or --wait longer"
    )


def run(group: PlacementGroup, command: list[str]) -> None:
    """Run `command` on every rank, and wait for its end."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    bundles = sorted(nodes, key=lambda bundle: nodes[bundle])  # one node after the other
    hosts = [addresses[nodes[bundle]] for bundle in bundles]
    plan = ",".join(f"{host}:{hosts.count(host)}" for host in dict.fromkeys(hosts))
    slots = get_host_assignments(parse_hosts(plan), len(hosts))
    rendezvous = RendezvousServer()
    port = rendezvous.start()
    rendezvous.init(slots)
    address = ray.util.get_node_ip_address()
    ranks = {}
    for slot, bundle in zip(slots, bundles, strict=True):
        resources = group.bundle_specs[bundle]
        task = run_rank.options(
            name=f"rank {slot.rank}",
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
        )
        ranks[task.remote(command, address, port, create_slot_env_vars(slot))] = slot.rank
    running, failed = list(ranks), ""
    while running:
        done, running = ray.wait(running, timeout=SECONDS_AFTER_FAILURE if failed else None)
        if not done:
            break
        failed = failed or why_failed(ranks[done[0]], done[0])
    if failed:
        sys.exit(f"error: {failed}; {AGAIN}")


def why_failed(rank: int, task: ray.ObjectRef) -> str:
    """Return why a rank failed that has ended, or an empty string."""
    try:
        code = ray.get(task)
    except ray.exceptions.RayError as error:
        return f"rank {rank} was lost: {str(error).splitlines()[0]}"
    return f"rank {rank} {how_it_ended(code)}" if code else ""


@ray.remote(max_retries=0, runtime_env=LET_RANKS_SAVE)
def run_rank(command: list[str], address: str, port: int, slot: dict[str, str]) -> int:
    """Run one rank in a process of its own, and return its exit code."""
    interface = interface_of(ray.util.get_node_ip_address())
    variables = {**create_run_env_vars(address, [interface], port), **slot}
    rank = subprocess.Popen(
        [*SIGTERM_WITH_WORKER, *command],
        cwd=PROJECT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        start_new_session=True,
    )
    # Not `subprocess.call`, which kills its process when Ray ends this worker with SIGTERM.
    code = rank.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
