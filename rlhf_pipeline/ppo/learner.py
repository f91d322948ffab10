"""Optimizer steps in one process, under DDP, or under DeepSpeed, which shards gradients and Adam's moments.

All of them write the same checkpoint, so a run can resume with another number of processes or another launcher.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.processes import ZERO

_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's moments


def make_learner(accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float | None) -> "Learner":
    """Return the learner for this launch. Gradients are clipped to norm `max_norm`; None or 0: no clipping."""
    kind = Learner if accelerator.state.deepspeed_plugin is None else ShardedLearner
    return kind(accelerator, model, optimizer, max_norm or 0.0)


def check_sharding(accelerator: Accelerator, args: Any) -> None:
    """Refuse settings that do not work under DeepSpeed."""
    if args.max_update_kl is not None:
        raise UserError("trainer.max_update_kl does not work under DeepSpeed; leave it out, or launch with DDP.")
    count = accelerator.num_processes
    if args.ptx_coef and (args.ptx_batch_size or 0) % count:
        raise UserError(f"under DeepSpeed trainer.ptx_batch_size must be a multiple of the processes, {count}.")


class Learner:
    """The networks and their optimizer, in one process or in several under DDP."""

    every_weight = False  # whether every backward pass has to reach all weights

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float) -> None:
        self.accelerator, self.max_norm = accelerator, max_norm
        self.network, self.optimizer = accelerator.prepare(model, optimizer)

    @contextmanager
    def adding(self, last: bool) -> Iterator[Any]:
        """Yield the network for one forward and backward pass. The `last` pass of a step synchronises the gradients."""
        with nullcontext() if last else self.accelerator.no_sync(self.network):
            yield self.network

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients, averaged over processes."""
        self.accelerator.backward(loss)

    def step(self) -> Tensor:
        """Update the weights and clear the gradients; returns the gradient's norm before clipping, a scalar."""
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.detach()

    def drop(self) -> None:
        """Discard the gradients without a step."""
        self.optimizer.zero_grad()

    def fill(self, parameter: Tensor, value: float) -> None:
        """Set all elements of a parameter to `value`."""
        with torch.no_grad(), self.whole(change=True):
            parameter.fill_(value)

    @contextmanager
    def whole(self, change: bool = False) -> Iterator[None]:
        """Gather all weights in this process, to sample, to save or to `change` them. Every process must enter."""
        yield

    def state_dict(self) -> dict[str, Any] | None:
        """Return the optimizer's state, under DeepSpeed only in process 0. Every process must call this."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, path: Path) -> None:
        """Load what `state_dict` returned. Code in the file is not run."""
        self.optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


class ShardedLearner(Learner):
    """The same under DeepSpeed: ZeRO-2 shards gradients and Adam's moments, ZeRO-3 the weights too (arXiv 1910.02054).

    Adam's moments are gathered to be saved, and sharded again when they are loaded.
    """

    # If the first backward pass of a step misses a weight, ZeRO-3 adds to its gradient of the step before.
    every_weight = True

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_norm: float) -> None:
        # All parameters in the order of the optimizer's state, and the number of them in each group.
        self._parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        if not isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass; for others checkpoints would be wrong
            raise UserError(
                f"under DeepSpeed trainer.optim must be Adam or AdamW (adamw_torch), not {type(optimizer).__name__}."
            )
        config: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = max_norm
        # The networks open autocast themselves; DeepSpeed would store their weights in 16 bits.
        config["bf16"] = config["fp16"] = {"enabled": False}
        config["zero_optimization"] = {**ZERO, **config["zero_optimization"]}
        super().__init__(accelerator, model, optimizer, max_norm)
        self._adam: Any = optimizer

    @contextmanager
    def adding(self, last: bool) -> Iterator[Any]:
        self.network.set_gradient_accumulation_boundary(is_boundary=last)
        yield self.network

    def backward(self, loss: Tensor) -> None:
        # accelerate's own would also take the optimizer step, which is the task of `step`.
        self.network.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self.network.step()
        return torch.as_tensor(self.network.get_global_grad_norm())

    def drop(self) -> None:
        raise NotImplementedError("DeepSpeed cannot discard gradients; check_sharding refuses settings that need it")

    def fill(self, parameter: Any, value: float) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        super().fill(parameter, value)  # the forward pass's weights; below, the optimizer's fp32 copy
        if self.network.zero_optimization_stage() < 3:
            safe_set_full_fp32_param(parameter, torch.full_like(parameter, value))
        else:  # each process has a shard, and all are padded to one size
            safe_set_local_fp32_param(parameter, torch.full_like(parameter.ds_tensor, value))

    @contextmanager
    def whole(self, change: bool = False) -> Iterator[None]:
        if self.network.zero_optimization_stage() < 3:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        every = list(self.network.module.parameters())
        with deepspeed.zero.GatheredParameters(every, modifier_rank=0 if change else None):
            remove_hooks(self.network)  # they would shard the weights again after each layer
            try:
                yield
            finally:
                add_hooks(self.network)

    def state_dict(self) -> dict[str, Any] | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        every = dict[int, dict[str, Tensor]]()
        step = max(float(s["step"]) for s in self._adam.state.values())
        for number, parameter in enumerate(self._parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
            if self.accelerator.is_main_process:  # the others take part, but keep nothing
                every[number] = {"step": torch.tensor(step), **{k: v.cpu().clone() for k, v in moments.items()}}
        if not self.accelerator.is_main_process:
            return None
        numbers = iter(range(len(self._parameters)))
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [next(numbers) for _ in range(size)]}
            for group, size in zip(self._adam.param_groups, self._sizes, strict=True)
        ]
        return {"state": every, "param_groups": groups}

    def load_state_dict(self, path: Path) -> None:
        found = torch.load(path, map_location="cpu", weights_only=True)
        engine = self.network.optimizer
        deep = self.network.zero_optimization_stage() == 3
        step = max((state["step"] for state in found["state"].values()), default=torch.tensor(0.0))
        for flat in engine.fp32_partitioned_groups_flat if deep else engine.single_partition_of_fp32_groups:
            self._adam.state[flat] = {"step": step.clone(), **{name: torch.zeros_like(flat) for name in _MOMENTS}}
        self._link()
        for number, state in found["state"].items():
            for name in _MOMENTS:
                self._put(self._parameters[number], state[name], name, deep)
        for group, kept in zip(self._adam.param_groups, found["param_groups"], strict=True):
            group.update({k: v for k, v in kept.items() if k != "params"})

    def _link(self) -> None:
        """Link parameters to their moments. DeepSpeed does so only once, when only the first group has taken a step."""
        engine = self.network.optimizer
        if hasattr(engine, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2
            engine._hp_optimizer_states_linked = False
            engine._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: Any, moment: Tensor, name: str, deep: bool) -> None:
        """Write one of Adam's moments, of the parameter's shape, into this process's shard."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not deep:
            return safe_set_full_optimizer_state(parameter, moment.to(parameter.device), name)
        size, rank = parameter.ds_tensor.numel(), self.accelerator.process_index
        flat = nn.functional.pad(moment.flatten(), (0, size * self.accelerator.num_processes - moment.numel()))
        return safe_set_local_optimizer_state(
            parameter, flat[size * rank : size * (rank + 1)].to(self.network.device), name
        )
