"""Train with mmengine's runner, but with this package's logger, training states, seeds and learning rate.

The runner brings the training loop, distributed wrapping, accumulation and mixed precision that mmdet's and
mmseg's models expect. Outputs and resumption are as in `vitpipe.train.loop`: every random draw is seeded by
(seed, step, chunk of the step), the learning rate is a function of the step, and a training state contains
everything else, so that a resumed run ends with the same weights, bit for bit on a CPU.
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

from vitpipe.config.recipe import DenseConfig
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

# More steps than any run has: the stages validate after training, at their own resolution and with their own
# tables.
_NEVER = 10**9
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def dense_groups(network: Any, dense: DenseConfig) -> list[dict[str, Any]]:
    """AdamW's parameter groups with the layer-wise learning-rate decay of the network's family.

    Learned queries and level embeddings of a head take no weight decay (Mask2Former, arXiv 2112.01527).

    Args:
        network: a detector or segmentor with `DenseMaps` as `backbone`.
    """
    net = network.backbone.net
    # They are 2-D, so the rule that exempts vectors (biases, norms) does not cover them.
    embeddings = tuple(
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(NET_PREFIX)
    )

    # Heads count as the layer above the network's last: they train at the full rate.
    def layer_of(name: str) -> int:
        inner = name.removeprefix(NET_PREFIX)
        return net.head_layer if inner == name else net.layer_of(inner)

    return parameter_groups(
        network.named_parameters(),
        weight_decay=dense.optim.weight_decay,
        no_decay=(*net.no_decay, *embeddings),
        layer_of=layer_of,
        layer_scales=net.layer_scales(dense.optim.layer_decay),
    )


def build_optimiser(network: nn.Module, dense: DenseConfig, plan: DensePlan) -> OptimWrapper:
    """AdamW over `dense_groups` in mmengine's wrapper: accumulation, loss scaling, gradient clipping."""
    groups = dense_groups(network, dense)
    adamw = build_adamw(groups, dense.optim)
    clipping = None if dense.optim.clip_grad_norm is None else {"max_norm": dense.optim.clip_grad_norm}
    settings: dict[str, Any] = {"accumulative_counts": plan.accumulation, "clip_grad": clipping}
    if plan.precision == "off":
        return OptimWrapper(adamw, **settings)
    # bfloat16 has float32's range of exponents: its gradients do not underflow, so they are not scaled.
    scale: Any = "dynamic" if plan.precision == "fp16" else 1.0
    return AmpOptimWrapper(scale, dtype=_DTYPES[plan.precision], optimizer=adamw, **settings)


class DenseRun:
    """One training run of a detector or segmentor.

    Args:
        network: on its device, with the weights from which an uninterrupted run starts.
        seed: of the recipe.
        states: folder of this run's training states.
        start: origin of the weights, logged when there is no saved state to resume from.
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
            # The configuration sets the norm of the heads only; batch norms between backbone and heads are
            # converted.
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.optimiser = build_optimiser(network, dense, plan)
        self.step = 0
        # Sums of the losses since the last logged point; saved, so that a resumed run logs the same means.
        self.window: dict[str, float] = {}

    def train(self, dataset: Any, groups: Sequence[int], workers: int) -> None:
        """Train from the newest saved state, or from step 0, to the end of the plan.

        Args:
            dataset: mmdet's or mmseg's, in training mode.
            groups: group number of each sample, see `feed.MicroBatches`.
            workers: loader processes.

        Raises:
            DivergenceError: the loss is no longer finite; the batch is saved beside the states.
            StoppedError: SIGTERM was received; the training state is saved.
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
                    # The loader starts at the step itself; mmengine would read and discard all earlier
                    # batches.
                    "fast_forward_on_resume": True,
                },
                optim_wrapper=self.optimiser,
                # None disables a hook that mmengine adds by default: all that these do is done by ours.
                default_hooks=dict.fromkeys(
                    ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
                ),
                custom_hooks=[_StepHook(self, stop)],
                # mmengine's defaults, written out: without OpenCV threads in workers, which would compete for
                # cores.
                env_cfg={"mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}},
                randomness={"seed": seed_of("dense", self.seed) & 0x7FFFFFFF},
                # mmengine keeps loggers in global tables by this name, and a process may run several stages.
                experiment_name=f"vitpipe-{uuid.uuid4().hex[:8]}",
            )
            runner.train()
        if self.ranks.num_ranks > 1:
            # With batch norm that is not synchronised, running statistics differ between ranks. Rank 0 saves
            # its own, so the others take them before evaluation.
            for buffer in self.network.buffers():
                dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that one step passes to the next, as tensors and plain values only."""
        return {
            "step": self.step,
            "window": dict(self.window),
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def _resume(self) -> None:
        """Load the newest state that rank 0 can read; without one, stay at step 0."""
        saved = self.states.newest() if self.ranks.is_main else None
        # Rank 0 decides for all: every rank must resume from the same step.
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
                fix="start again with another --state folder",
            ) from error
        self.step, self.window = step, dict(saved["window"])
        self.logger.rewind(step)
        self.logger.say(f"Resuming after step {step}")


class _StepHook(Hook):
    """Maps the runner's iterations (micro-batches) to steps: seeds, learning rate, logging, states."""

    priority = "VERY_HIGH"

    def __init__(self, run: DenseRun, stop: StopRequest) -> None:
        self.run, self.stop = run, stop
        self.pace = Speedometer(run.step)
        self.losses: dict[str, float] = {}

    def before_run(self, runner: Runner) -> None:
        # mmengine sets it only when it loads a checkpoint of its own.
        runner.train_loop._iter = self.run.step * self.run.plan.accumulation

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        run = self.run
        step, micro = divmod(batch_idx, run.plan.accumulation)
        chunk = micro * run.ranks.num_ranks + run.ranks.rank
        # By chunk of the global batch, not by rank: a step draws the same for any number of ranks and
        # micro-batches.
        number = seed_of("step", run.seed, step, chunk)
        random.seed(number)
        # numpy takes 32 bits.
        np.random.seed(number & 0xFFFFFFFF)
        torch.manual_seed(number)
        set_learning_rate(run.optimiser.optimizer, run.dense.optim.base_lr * run.plan.lr_factor(step))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        run = self.run
        values = {name: float(value.detach()) for name, value in outputs.items() if "loss" in name}
        # A detector's outputs hold accuracies as well; only losses are logged and checked.
        finite = all(map(math.isfinite, values.values()))
        # One exchange for all: every rank must learn of a divergence or a stop in the same step, else the
        # others would wait for it.
        flags = [float(not finite), float(self.stop.requested)]
        num_bad, num_stops, *totals = run.ranks.sum_numbers([*flags, *values.values()])
        if num_bad:
            # Only the rank whose loss is not finite saves its batch.
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
            # Recorded before the state is saved and committed after: a point that a resume repeats is never
            # shown.
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
            "learning_rate": run.dense.optim.base_lr * run.plan.lr_factor(run.step - 1),
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
            f"Training diverged: the loss is not finite in step {run.step + 1}; the batch is saved",
            where=place,
            fix="lower base_lr, lengthen warmup_steps, or use precision off or bf16",
        )


class _SilentRunner(Runner):
    """mmengine's runner with its log in a file beside the training states instead of on the terminal."""

    def __init__(self, ranks: Ranks, **settings: Any) -> None:
        self._ranks = ranks
        super().__init__(**settings)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The runner's own logger: console level ERROR, full log in `mmengine.log`."""
        log_file = Path(self.log_dir) / "mmengine.log"
        logger = super().build_logger(log_level="INFO", log_file=str(log_file))
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """A visualizer without a backend: it writes nothing (mmengine's default writes `vis_data`)."""
        return Visualizer.get_instance(self._experiment_name)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Wrap the model in DistributedDataParallel; it is on its device already."""
        if self._ranks.num_ranks == 1:
            return model
        devices = None if self._ranks.device.type == "cpu" else [self._ranks.device]
        # Every rank keeps its own batch statistics. torch 2.11, the oldest supported, knows the option only
        # by its earlier name.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return MMDistributedDataParallel(model, device_ids=devices, **{option: False})

    def dump_config(self) -> None:
        """Do nothing: the stage writes the configuration, `mm_config.json`."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Do nothing: the stage's card has the environment, and mmengine starts compilers for it (1 s)."""

    def _init_model_weights(self) -> None:
        """Do nothing: initial values are drawn when the network is built, before weights are loaded."""
