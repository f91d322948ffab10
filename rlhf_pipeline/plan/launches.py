"""Ways to launch a job, the simplest first, and which of them fits the accelerators that there are."""

from dataclasses import dataclass

from rlhf_pipeline.plan.cost import flops, seconds
from rlhf_pipeline.plan.devices import LAUNCHES, Device
from rlhf_pipeline.plan.memory import BASE_CPU, BASE_GPU, SLACK_CPU, Parts, Roles, Sharding, Work, peak

# Of an accelerator's memory, what can be filled: the allocator's blocks leave gaps.
USABLE = 0.92


@dataclass(frozen=True)
class Option:
    """A launch on so many processes: bytes a process by part at the fullest moment, seconds an update by part."""

    launch: str
    processes: int
    moment: str
    parts: Parts
    seconds: dict[str, float]
    flops: dict[str, float]
    fits: bool

    @property
    def bytes(self) -> float:
        """What a process needs."""
        return sum(self.parts.values())

    @property
    def update(self) -> float:
        """Seconds an update."""
        return sum(self.seconds.values())


def sharding(launch: str, processes: int) -> Sharding:
    """What a launch divides among its processes: ZeRO's stages; FSDP shards what ZeRO-3 does (arXiv 2304.11277)."""
    if launch == "zero2":
        return Sharding(processes, gradients=processes, adam=processes)
    if launch in ("zero3", "fsdp"):
        return Sharding(processes, weights=processes, gradients=processes, adam=processes)
    return Sharding(processes, buckets=launch == "ddp" and processes > 1)


def option(launch: str, processes: int, roles: Roles, work: Work, device: Device, cpu: bool, mfu: float) -> Option:
    """What one launch needs."""
    how = sharding(launch, processes)
    moment, parts = peak(roles, work, how, *((BASE_CPU, SLACK_CPU) if cpu else (BASE_GPU, 0)))
    fits = sum(parts.values()) <= USABLE * device.memory
    taken = seconds(roles, work, how, device, mfu)
    return Option(launch, processes, moment, parts, taken, flops(roles, work), fits)


def options(count: int, roles: Roles, work: Work, device: Device, cpu: bool, mfu: float) -> list[Option]:
    """Every launch on `count` devices, or on one where there is but one; the simplest first."""
    names = LAUNCHES[1:] if count > 1 else LAUNCHES[:1]
    return [option(name, count, roles, work, device, cpu, mfu) for name in names]


def fewest(count: int, roles: Roles, work: Work, device: Device, cpu: bool, mfu: float) -> Option | None:
    """The launch that fits on the fewest devices, up to `count`; of those on as many, the simplest."""
    for number in range(1, count + 1):
        for found in options(number, roles, work, device, cpu, mfu):
            if found.fits:
                return found
    return None
