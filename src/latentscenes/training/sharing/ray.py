"""Ranks as actors of a Ray cluster: restarted without limit when their process or node dies.

Actors write learned scenes to the parts, which all nodes see, and return a number only. A call returns when
all scenes are in the library; so the first actor that returns ends the work, also if others wait for room.
"""

import os
from typing import Any

from latentscenes.core.console import say
from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.processes import CHECK_SECONDS
from latentscenes.core.runtime import StopFlag
from latentscenes.training.sharing.ranks import RankCall


class Learner:
    """A rank in a process of its own."""

    def learn(self, own: RankCall) -> int:
        return own()


def learn(call: RankCall, count: int | None, address: str | None, options: dict[str, Any]) -> int:
    """Learns with `count` actors until all scenes are in the library. Returns the number of actors.

    Args:
        count: None: as many as the cluster has room for.
        address: cluster to connect to; None: a new one of this machine.
        options: options of an actor (`num_cpus`, `num_gpus`, `resources` …); one core by default.

    Raises:
        UserError: Ray is absent, there is no cluster at `address`, or every actor failed.
        Interrupted: a signal asked to stop.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics over the network
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError('--engine ray: Ray is absent. Run: pip install "latentscenes[ray]"') from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        needs = {"num_cpus": 1} | options
        count = count or _capacity(ray, needs)
        say(f"{count} actors of Ray learn …")
        return _learned(ray, call, count, needs)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
    try:
        ray.init(address=address, log_to_driver=True, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster ({' '.join(str(error).split())[:200]}). Start one with "
            "`ray start`, or leave --address out."
        ) from None


def _capacity(ray: Any, needs: dict[str, Any]) -> int:
    """Returns how many actors the nodes of the cluster have room for."""
    wanted = {"CPU": needs.get("num_cpus", 0), "GPU": needs.get("num_gpus", 0), **needs.get("resources", {})}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(min(int(node.get(name, 0) / amount) for name, amount in wanted.items()) for node in nodes)
    if count < 1:
        raise UserError(f"--engine ray: no node of the cluster has {wanted}. Correct --engine-options.")
    return count


def _learned(ray: Any, call: RankCall, count: int, needs: dict[str, Any]) -> int:
    try:
        remote = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(Learner)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--engine-options: {' '.join(str(error).split())[:300]}. See the options of Ray's actors."
        ) from None
    actors = [remote.remote() for _ in range(count)]
    waiting = {actor.learn.remote(call.of(number, count)): number for number, actor in enumerate(actors)}
    problem: Exception | None = None
    with StopFlag() as stopped:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=CHECK_SECONDS)
            if stopped:
                raise Interrupted
            for result in ready:
                number = waiting.pop(result)
                try:
                    ray.get(result)
                    return count
                except ray.exceptions.RayTaskError as error:
                    problem = error.cause
                    if isinstance(problem, Interrupted):  # its node is going away
                        again = actors[number].learn.remote(call.of(number, count))
                        waiting[again] = number
                    else:
                        say(f"Rank {number} failed: {problem}")
    raise problem if isinstance(problem, UserError) else RuntimeError(f"every actor failed: {problem}")
