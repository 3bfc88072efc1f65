"""Training with mmengine's runner, under our rules: our logger, our states, our seeds, our learning rate.

The runner brings the training loop, distributed wrapping, accumulation and mixed precision that mmdet's and
mmseg's models expect. What a run leaves behind and how it goes on after a kill is as in `vitpipe.train.loop`:
every draw is seeded from (seed, step, chunk of the step), the learning rate is a function of the step, and a
state holds all the rest, so a resumed run ends in the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitpipe.config.recipe import DenseConfig, OptimConfig
from vitpipe.contracts.errors import CheckpointError, DivergenceError, disk_errors
from vitpipe.contracts.logger import RunLogger
from vitpipe.contracts.seeds import seed_of
from vitpipe.dense.backbone import NET_PREFIX
from vitpipe.dense.feed import train_loader
from vitpipe.dense.plan import DensePlan
from vitpipe.optim.groups import parameter_groups
from vitpipe.optim.optimiser import build_adamw, set_learning_rate
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.health import StopRequest, stop_on_sigterm, stopped
from vitpipe.train.ranks import Ranks
from vitpipe.train.speedometer import Speedometer, peak_memory_gib

_NEVER = 10**9
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def dense_groups(network: Any, dense: DenseConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups with the layer-wise learning-rate decay of the network's family.

    Learned queries and level embeddings of a head take no weight decay (Mask2Former, arXiv 2112.01527).

    Args:
        network: a detector or segmentor with `DenseMaps` as `backbone`.
    """
    net = network.backbone.net
    embeddings = tuple(
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(NET_PREFIX)
    )

    def layer_of(name: str) -> int:
        inner = name.removeprefix(NET_PREFIX)
        return net.head_layer if inner == name else net.layer_of(inner)

    return parameter_groups(
        network.named_parameters(),
        weight_decay=dense.weight_decay,
        no_decay=(*net.no_decay, *embeddings),
        layer_of=layer_of,
        layer_scales=net.layer_scales(dense.layer_decay),
    )


def build_optimiser(network: nn.Module, dense: DenseConfig, plan: DensePlan) -> OptimWrapper:
    """AdamW over `dense_groups` in mmengine's wrapper, which accumulates, scales and clips."""
    groups = dense_groups(network, dense)
    adamw = build_adamw(groups, OptimConfig(base_lr=dense.base_lr, betas=dense.betas))
    clipping = None if dense.clip_grad_norm is None else {"max_norm": dense.clip_grad_norm}
    settings: dict[str, Any] = {"accumulative_counts": plan.accumulation, "clip_grad": clipping}
    if plan.precision == "off":
        return OptimWrapper(adamw, **settings)
    scale: Any = "dynamic" if plan.precision == "fp16" else 1.0
    return AmpOptimWrapper(scale, dtype=_DTYPES[plan.precision], optimizer=adamw, **settings)


class DenseRun:
    """One training of a detector or segmentor.

    Args:
        network: on its device, as an undisturbed run begins.
        seed: of the recipe.
        states: where this run's states are saved.
        start: what the weights are, said when there is no state to go on from.
    """

    def __init__(
        self,
        network: nn.Module,
        dense: DenseConfig,
        plan: DensePlan,
        *,
        seed: int,
        ranks: Ranks,
        states: StateFolder,
        logger: RunLogger,
        start: str = "",
    ) -> None:
        self.network, self.dense, self.plan = network, dense, plan
        self.seed, self.ranks, self.states, self.logger = seed, ranks, states, logger
        self.start = start
        if plan.norm == "SyncBN":
            # The heads' batch norms are made so; those between backbone and heads are not.
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.optimiser = build_optimiser(network, dense, plan)
        self.step = 0
        self.window: dict[str, float] = {}

    def train(self, dataset: Any, groups: Sequence[int], workers: int) -> None:
        """Train from the newest saved state, or from the start, to the end of the plan.

        Args:
            dataset: mmdet's or mmseg's, in training mode.
            groups: of samples that are better not padded together; see `feed.MicroBatches`.
            workers: loader processes.

        Raises:
            DivergenceError: the loss is no longer finite; the batch is saved beside the states.
            StoppedError: SIGTERM came; the state is saved.
        """
        self._resume()
        if self.step == self.plan.num_steps:
            return
        loader = train_loader(
            dataset,
            self.plan,
            groups,
            seed=self.seed,
            rank=self.ranks.rank,
            start_step=self.step,
            workers=workers,
        )
        with stop_on_sigterm() as stop:
            runner = _SilentRunner(
                self.ranks,
                model=self.network,
                work_dir=str(self.states.folder),
                train_dataloader=loader,
                train_cfg={
                    "by_epoch": False,
                    "max_iters": self.plan.num_steps * self.plan.accumulation,
                    "val_interval": _NEVER,
                    # Our loader begins at the step itself: nothing to wind forward.
                    "fast_forward_on_resume": True,
                },
                optim_wrapper=self.optimiser,
                default_hooks=dict.fromkeys(
                    ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
                ),
                custom_hooks=[_StepHook(self, stop)],
                env_cfg={"mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}},
                randomness={"seed": seed_of("dense", self.seed) & 0x7FFFFFFF},
                experiment_name=f"vitpipe-{uuid.uuid4().hex[:8]}",
            )
            runner.train()
        if self.ranks.num_ranks > 1:
            # Unsynchronised batch norm leaves other statistics on every rank; the saved ones are rank 0's.
            for buffer in self.network.buffers():
                dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """All that a step hands to the next, tensors and plain values only."""
        return {
            "step": self.step,
            "window": dict(self.window),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def _resume(self) -> None:
        """Go to the newest state that rank 0 can read; without one, stay at the start."""
        saved = self.states.newest() if self.ranks.is_main else None
        step = self.ranks.from_main(saved["step"] if saved else -1)
        if step < 0:
            self.logger.rewind(0)
            if self.start:
                self.logger.say(self.start)
            return
        saved = saved or self.states.read(step)
        try:
            self.network.load_state_dict(saved["network"])
            self.optimiser.load_state_dict(saved["optimiser"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The training state does not fit this network ({str(error).splitlines()[0][:120]})",
                where=self.states.path_of(step),
                fix="start again with another --state",
            ) from error
        self.step, self.window = step, dict(saved["window"])
        self.logger.rewind(step)
        self.logger.say(f"Going on after step {step}")


class _StepHook(Hook):
    """Ties the runner's iterations (micro-batches) to our steps."""

    priority = "VERY_HIGH"

    def __init__(self, run: DenseRun, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.pace = Speedometer(run.step)
        self.losses: dict[str, float] = {}

    def before_run(self, runner: Runner) -> None:
        runner.train_loop._iter = self.run.step * self.run.plan.accumulation

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        run = self.run
        step, micro = divmod(batch_idx, run.plan.accumulation)
        chunk = micro * run.ranks.num_ranks + run.ranks.rank
        number = seed_of("step", run.seed, step, chunk)
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)
        torch.manual_seed(number)
        set_learning_rate(run.optimiser.optimizer, run.dense.base_lr * run.plan.lr_factor(step))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        run = self.run
        values = {name: float(value.detach()) for name, value in outputs.items() if "loss" in name}
        finite = all(map(math.isfinite, values.values()))
        flags = [float(not finite), float(self.stop.requested)]
        num_bad, num_stops, *totals = run.ranks.sum_numbers([*flags, *values.values()])
        if num_bad:
            raise self._divergence(data_batch if not finite else None)
        for name, total in zip(values, totals, strict=True):
            mean = total / (run.ranks.num_ranks * run.plan.accumulation)
            self.losses[name] = self.losses.get(name, 0.0) + mean
        if (batch_idx + 1) % run.plan.accumulation == 0:
            self._after_step(stopping=num_stops > 0)

    def _after_step(self, *, stopping: bool) -> None:
        run, plan, losses = self.run, self.run.plan, self.losses
        run.step, self.losses = run.step + 1, {}
        for name, value in {**losses, "steps": 1.0}.items():
            run.window[name] = run.window.get(name, 0.0) + value
        run.logger.progress(run.step, plan.num_steps, {"loss": losses["loss"]})
        last = run.step == plan.num_steps
        if last or run.step % run.dense.log_every_steps == 0:
            run.logger.metrics(self._points(), run.step)
            run.window = {}
        if last or stopping or self.pace.minutes_since_save() >= run.dense.checkpoint_minutes:
            if run.ranks.is_main:
                run.states.save(run.state_dict(), run.step)
            run.logger.commit(run.step)
            self.pace.saved()
        if stopping and not last:
            raise stopped(run.states.folder, run.step, plan.num_steps)

    def _points(self) -> dict[str, float]:
        run = self.run
        num_steps = run.window["steps"]
        means = {name: total / num_steps for name, total in run.window.items() if name != "steps"}
        rate = self.pace.images_per_second(run.step, run.plan.global_batch)
        points = {
            **means,
            "learning_rate": run.dense.base_lr * run.plan.lr_factor(run.step - 1),
            "images_per_second": rate,
            "memory_gib": peak_memory_gib(run.ranks.device),
        }
        return {f"train/{name}": value for name, value in points.items()}

    def _divergence(self, suspect: Any) -> DivergenceError:
        run = self.run
        place = run.states.folder / f"diverged-step{run.step:09d}-rank{run.ranks.rank}.pt"
        if suspect is not None:
            with disk_errors(place):
                paths = [getattr(sample, "img_path", "") for sample in suspect["data_samples"]]
                torch.save({"images": suspect["inputs"], "paths": paths}, place)
        return DivergenceError(
            f"Training diverged: the loss is not finite in step {run.step + 1}; the batch has been saved",
            where=place,
            fix="lower base_lr, lengthen warmup_steps, or use precision off or bf16",
        )


class _SilentRunner(Runner):
    """mmengine's runner without its wall of text: its log goes to a file beside the states."""

    def __init__(self, ranks: Ranks, **settings: Any) -> None:
        self._ranks = ranks
        super().__init__(**settings)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The runner's own logger, deaf on the terminal below errors."""
        log_file = Path(self.log_dir) / "mmengine.log"
        logger = super().build_logger(log_level="INFO", log_file=str(log_file))
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """One that draws and writes nothing."""
        return Visualizer.get_instance(self._experiment_name)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Share gradients over the ranks; the network is on its device already."""
        if self._ranks.num_ranks == 1:
            return model
        devices = None if self._ranks.device.type == "cpu" else [self._ranks.device]
        # Every rank keeps its own batch statistics. Older torch has the option's earlier name only.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return MMDistributedDataParallel(model, device_ids=devices, **{option: False})

    def dump_config(self) -> None:
        """Nothing: the stage writes the configuration it was built from."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing: the stage's card says what it ran on, and asking compilers takes a second."""

    def _init_model_weights(self) -> None:
        """Nothing: start values are drawn when the network is built, before weights are loaded."""
