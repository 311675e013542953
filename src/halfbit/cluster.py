"""Groups of experts solved by a Ray cluster (https://docs.ray.io), one actor per worker.

The loop reads the weights and ships a group to the worker whose turn it is; what a module is given lies in Ray's object
store, once on each machine, and all workers of a machine map it. A worker sends back packed matrices, an eighth of the
codes. One that dies is started again by Ray, and its group is solved again, to the same bits.
"""

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfbit import heap, native
from halfbit.activations import Routed
from halfbit.crew import Crew, Devices, Finished, Given, Rules, finish
from halfbit.errors import ClusterError, Unsupported
from halfbit.expert_groups import Group, solve
from halfbit.pipeline import Profile
from halfbit.recipe import Recipe

LOCAL = "local"
# how often a worker that dies is started again for one group, before that is an error
RETRIES = 5
# of a group
WEIGHTS = ("up", "down", "up_bias", "down_bias")


def _shipped(tensor: Tensor) -> tuple[Any, torch.dtype, torch.Size]:
    """A tensor on its way: bytes that Ray neither pickles nor copies on one machine."""
    plain = tensor.detach().cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy(), plain.dtype, plain.shape


def _arrived(shipped: tuple[Any, torch.dtype, torch.Size]) -> Tensor:
    """The tensor, read-only."""
    content, dtype, shape = shipped
    with warnings.catch_warnings():
        # nobody writes into it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(content).view(dtype).view(shape)


def _know_tensors(ray: Any) -> None:
    """In this process; pickling as torch does it copies, and fails for some dtypes."""
    ray.util.register_serializer(Tensor, serializer=_shipped, deserializer=_arrived)


def about(kind: str) -> dict[str, str]:
    """What must be the same everywhere, for groups to come out alike."""
    found = {name: importlib.metadata.version(name) for name in ("halfbit", "torch")}
    return found | {"instructions": native.isa(), "device": kind}


class Worker:
    """What runs in a process of the cluster.

    Args:
        device: of this worker.
    """

    def __init__(self, device: str):
        import ray

        self._device = device
        _know_tensors(ray)

    def about(self) -> dict[str, str]:
        return about(self._device)

    def solve(
        self, group: Group, rules: Rules, asked: tuple[Recipe, int, dict[str, Tensor] | None, Tensor | None]
    ) -> Finished:
        recipe, num_experts, questions, theirs = asked
        given = Given(recipe, None if questions is None else Routed.asked(num_experts, questions), theirs)
        group = replace(
            group, **{name: w.to(self._device) for name in WEIGHTS if (w := getattr(group, name)) is not None}
        )
        found, _ = finish(group, rules, solve(group, rules, recipe, given.routed, theirs), given, Profile())
        heap.trim()
        return found


class Cluster:
    """The workers of a cluster that is connected.

    Args:
        ray: the module.
        count: workers.
        device: of the loop, and the kind of the workers'.
    """

    def __init__(self, ray: Any, count: int, device: str):
        self._ray, self.devices = ray, [device] * count
        _know_tensors(ray)
        kind = torch.device(device).type
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // count)
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": RETRIES, "num_cpus": threads}
        if kind == "cuda":
            options |= {"num_cpus": 1, "num_gpus": 1}
        self._workers = [ray.remote(Worker).options(**options).remote(kind) for _ in range(count)]
        self._check(about(kind))

    def _check(self, ours: dict[str, str]) -> None:
        asked = [worker.about.remote() for worker in self._workers]
        ready, late = self._ray.wait(asked, num_returns=len(asked), timeout=300)
        if late:
            raise ClusterError(
                f"--workers {len(asked)}: the cluster has started {len(ready)} within 300 s; it has "
                f"{self._ray.cluster_resources().get('CPU', 0):g} CPUs and "
                f"{self._ray.cluster_resources().get('GPU', 0):g} GPUs; ask for fewer"
            )
        for theirs in self._ray.get(asked):
            if theirs != ours:
                wrong = next(name for name in ours if theirs[name] != ours[name])
                raise ClusterError(
                    f"a worker has {wrong} {theirs[wrong]} where this process has {ours[wrong]}, so groups would not "
                    "come out alike; install the same everywhere, on machines of one kind"
                )

    def begin(self, given: Given) -> Any:
        routed = given.routed
        questions = (0, None) if routed is None else (routed.num_experts, routed.questions())
        return self._ray.put((given.recipe, *questions, given.theirs))

    def solve(self, worker: int, group: Group, rules: Rules, given: Any) -> Finished:
        try:
            return self._ray.get(self._workers[worker].solve.remote(group, rules, given))
        except self._ray.exceptions.RayTaskError as e:
            # what the worker raised, as if it were this process
            raise e.cause from e
        except self._ray.exceptions.RayActorError as e:
            raise ClusterError(
                f"{group.names[0]}: the worker that solves its group died {RETRIES + 1} times; the same command goes "
                "on from here. Out of memory, most likely: fewer workers, or a smaller experts_per_batch in [solving]"
            ) from e


@contextmanager
def hired(device: str, address: str | None = None, workers: int = 0) -> Iterator[Crew]:
    """Who solves groups of experts.

    Args:
        device: one or, without a cluster, more of one kind, "cuda:0,cuda:1"; the loop has the first.
        address: of a Ray cluster, or LOCAL for one on this machine that ends with the run; None: no cluster.
        workers: of the cluster; 0: one for each GPU, or without them one for each machine.

    Raises:
        Unsupported: devices of two kinds; Ray is not installed.
        ClusterError: no cluster there; too little room in it; a worker with other versions.
    """
    devices = device.split(",")
    if len({torch.device(name).type for name in devices}) > 1:
        raise Unsupported(f"device {device}: devices of two kinds round differently; give devices of one kind")
    if address is None:
        yield Devices(devices)
        return
    try:
        import ray
        import ray.exceptions
    except ImportError as e:
        raise Unsupported(f"--ray: {e}; install it with `pip install 'halfbit[ray]'`") from e
    own: dict[str, Any] = {"num_cpus": max(workers, torch.get_num_threads()), "include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if address == LOCAL else {}))
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ClusterError(f"--ray {address}: {e}; give `local`, or the address that `ray start` printed") from e
    try:
        yield Cluster(ray, workers or _count(ray, device), devices[0])
    finally:
        ray.shutdown()


def _count(ray: Any, device: str) -> int:
    gpus = int(ray.cluster_resources().get("GPU", 0)) if torch.device(device).type == "cuda" else 0
    return gpus or sum(node["Alive"] for node in ray.nodes())
