"""``FilterCallback``: the guard rails that every callback of this package shares.

A subclass says which layers it wants, prepares itself in :meth:`FilterCallback.prepare`, and acts in Lightning's hooks.
The base class does the rest. It chooses layers once the network is final and refuses what cannot be exact. It has a
stable state key and a state that a ``weights_only`` load accepts. It removes optimizer hooks in every case, and can
check that ranks agree.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim import Optimizer

from lightning_filterdiv.filters import (
    Conv,
    NoLayersError,
    check_patterns,
    filter_count,
    named_convolutions,
    select_filters,
)
from lightning_filterdiv.tensors.arguments import check_integer
from lightning_filterdiv.tensors.rank_check import check_ranks_agree
from lightning_filterdiv.training.steps import StepProtocol, optimizer_index
from lightning_filterdiv.training.versions import warn_once_about_versions

__all__ = ["FilterCallback"]

_STATE_VERSION = 1
#: Exceptions that reading a damaged state may raise.
DAMAGED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def describe_damage(error: Exception) -> str:
    """Return the message of an error in :data:`DAMAGED` on one line."""
    said = " ".join(str(error).split())
    return f"missing entry {said}" if isinstance(error, KeyError) else said


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


class FilterCallback(Callback):
    """Base of all callbacks of this package.

    Every constructor argument is keyword-only, a plain value, and stored under its own name. ``repr`` and the saved
    state rely on this.

    Args:
        include: patterns of layers to act on; ``None`` for the method's default.
        exclude: patterns of layers to leave out.
        check_ranks_every_n_steps: compare the touched tensors bit by bit across ranks every so many steps and raise
            if they differ; 0 (default) never. For debugging: it synchronises.
    """

    #: Exact strategy classes in which every rank holds whole parameters and whole gradients, in both of Lightning's
    #: namespaces (DeepSpeed's class derives from DDP's, so subclasses do not count). To add a strategy, check that this
    #: is true of it and add its qualified name.
    trusted_strategies: ClassVar[set[str]] = {
        f"{package}.strategies.{strategy}"
        for package in ("lightning.pytorch", "pytorch_lightning")
        for strategy in ("single_device.SingleDeviceStrategy", "ddp.DDPStrategy")
    }
    #: Position among callbacks that edit gradients: penalties (10) before averages (20) before masks (30).
    gradient_stage: ClassVar[int | None] = None
    #: Name of the callback in the tags of loggers: ``filterdiv/<log_prefix>/...``.
    log_prefix: ClassVar[str] = ""
    #: What :meth:`attempt` writes -> the argument that turns it off.
    silenced_by: ClassVar[Mapping[str, str]] = {}
    #: Leave frozen layers alone. A monitor measures them too.
    trainable_only: ClassVar[bool] = True
    #: Two instances of the class may share a layer.
    shares_layers: ClassVar[bool] = False
    #: A fit may begin while every chosen layer is frozen. :meth:`prepare` is then called when one is unfrozen. All
    #: other hooks must work before that call.
    waits_for_layers: ClassVar[bool] = False
    #: What a fit in child processes loses. Launchers that spawn or fork (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``)
    #: copy only weights back. They are allowed if this is empty.
    lost_in_child_processes: ClassVar[str] = ""
    #: Classes of callbacks, by name, beside which this callback cannot work -> reason.
    refused_beside: ClassVar[Mapping[str, str]] = {}
    #: Arguments whose value a resume takes from the checkpoint -> reason. Their new values are not used. See
    #: :meth:`kept_on_resume`. New values of all other arguments are used from the first step on.
    fixed_on_resume: ClassVar[Mapping[str, str]] = {}
    #: Arguments that select layers. They alone make up the state key.
    identity_arguments: ClassVar[tuple[str, ...]] = ("include", "exclude", "network")

    def __init__(
        self,
        *,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__()
        self.include = check_patterns("include", include)
        self.exclude = check_patterns("exclude", exclude)
        self.check_ranks_every_n_steps = check_integer("check_ranks_every_n_steps", check_ranks_every_n_steps, low=0)
        self.layers: dict[str, Conv] = {}
        self._trainer: pl.Trainer | None = None
        self._steps: dict[int, StepProtocol] = {}
        self._restored_layers: dict[str, int] | None = None
        self._restored: Literal["trainer", "hand"] | None = None
        self._loading_for: str | None = None
        self._kept_arguments: dict[str, Any] = {}  # as the checkpoint has them
        # Model of the fit that the state belongs to. The state of another fit is never used, whatever ended that fit.
        self._fit_of: weakref.ref[pl.Trainer] | None = None
        self._trainable: tuple[tuple[int, bool], ...] = ()
        self._waiting = False
        self._failed: set[str] = set()  # what could not be written in this fit

    # ------------------------------------------------------------------ for subclasses

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare for training with ``self.layers``. Network, optimizers and restored state are final by now."""

    def wait(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait while every chosen layer is frozen. Called instead of :meth:`prepare`, if :attr:`waits_for_layers`.

        Override it to raise an error if restored state does not allow waiting.
        """

    def release(self) -> None:
        """Undo what :meth:`prepare` did to the model. Called whenever training ends, also by an exception."""

    def reset(self) -> None:
        """Forget the previous fit, so that the object is as new. Called whenever another fit starts."""

    def extra_state(self) -> dict[str, Any]:
        """Return what a resume needs, as tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: the state is damaged; reported
                with the callback's name.
        """

    def kept_on_resume(self) -> Mapping[str, str]:
        """Return arguments whose values come from the loaded state, and why; by default :attr:`fixed_on_resume`."""
        return self.fixed_on_resume

    def arguments_changed(self, saved: Mapping[str, Any]) -> None:
        """Drop loaded state that depends on changed arguments. ``saved`` has their old values."""

    def touched_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that must stay identical on all ranks; by default weights and biases of the chosen
        layers."""
        return {f"{name}.{key}": p for name, conv in self.layers.items() for key, p in conv.named_parameters()}

    def before_step(self, index: int) -> None:
        """Edit the final gradients of ``self.trainer.optimizers[index]``, or remember what must not move.

        Called for optimizers that :meth:`follow_steps` named. A gradient scaler may still skip the step. The next call
        then discards what this one remembered.
        """

    def after_step(self, index: int) -> None:
        """Act on weights after a step of ``self.trainer.optimizers[index]`` that was really taken."""

    def repeated_step(self, index: int) -> None:
        """Handle a further evaluation of the same step (SAM). Called instead of :meth:`before_step`.

        Every evaluation has its own gradients, so a rule on gradients edits each of them. A rule that remembers weights
        must override this, because the optimizer has already moved them.
        """
        self.before_step(index)

    def follow_steps(self, index: int) -> None:
        """Have :meth:`before_step` and :meth:`after_step` called for this optimizer until training ends."""
        optimizer = self.trainer.optimizers[index]
        self._steps[index] = StepProtocol(optimizer, partial(self.after_step, index), type(self).__name__)

    def layers_of(self, index: int) -> dict[str, Conv]:
        """Return the chosen layers whose weight ``self.trainer.optimizers[index]`` owns."""
        groups = self.trainer.optimizers[index].param_groups
        owned = {id(p) for group in groups for p in group["params"]}
        return {name: conv for name, conv in self.layers.items() if id(conv.weight) in owned}

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer of the running fit.

        Raises:
            RuntimeError: no fit is running.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__} is not in a running fit; pass it to Trainer(callbacks=[...])")
        return self._trainer

    def log_metrics(self, numbers: Mapping[str, float]) -> None:
        """Log numbers to all loggers as ``filterdiv/<log_prefix>/<name>``, on rank 0, at the current step.

        If a logger fails (full disk, network), the others still get the numbers and the fit continues.
        """
        if not self.trainer.is_global_zero:
            return
        prefix = "filterdiv/" + (f"{self.log_prefix}/" if self.log_prefix else "")
        named = {prefix + name: float(value) for name, value in numbers.items()}
        for logger in self.trainer.loggers:
            self.attempt("numbers", partial(logger.log_metrics, named, step=self.trainer.global_step))

    def attempt(self, what: str, write: Callable[[], object], verb: str = "write") -> None:
        """Call ``write`` and turn its failure into a warning. A failed write must not end training.

        Args:
            what: plural noun for what is written. There is one warning for each in a fit.
            write: function that may raise any exception. An interrupt is passed on.
            verb: verb for the action that failed.
        """
        try:
            write()
        except Exception as error:  # disks, servers, loggers and matplotlib have errors of many types
            self.warn_once(what, f"could not {verb} {what} ({type(error).__name__}: {' '.join(str(error).split())})")

    def warn_once(self, what: str, said: str) -> None:
        """Warn that something about ``what`` failed, once in a fit; see :meth:`attempt`."""
        if what not in self._failed:
            self._failed.add(what)
            way_out = self.silenced_by.get(what)
            rank_zero_warn(
                f"{type(self).__name__} {said}. Training goes on, and later failures are not reported"
                + (f"; {way_out} writes none" if way_out else "")
            )

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return the layers that ``include`` and ``exclude`` select. Override it for another default."""
        return select_filters(pl_module, self.include, self.exclude)

    # ------------------------------------------------------------------ identity, repr, state

    def arguments(self) -> dict[str, Any]:
        """Return constructor arguments by name, with those of the parent if a subclass passes ``**kwargs`` on."""
        values: dict[str, Any] = {}
        for cls in type(self).__mro__:
            parameters = inspect.signature(cls).parameters.values()
            values |= {
                p.name: getattr(self, p.name) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
            if cls is FilterCallback or not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments().items())})"

    @property
    def state_key(self) -> str:
        """Key of class and layer patterns alone, so that a resume with another number still finds its state."""
        identity = {name: value for name, value in self.arguments().items() if name in self.identity_arguments}
        return self._generate_state_key(**identity)

    def state_dict(self) -> dict[str, Any]:
        """State that loads with ``weights_only=True``."""
        return {
            "version": _STATE_VERSION,
            "arguments": self.arguments() | self._kept_arguments,
            "layers": {name: filter_count(conv) for name, conv in self.layers.items()} or self._restored_layers or {},
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state and say which arguments changed since it was saved, and which values are used.

        Raises:
            ValueError: the state is damaged or was written by a newer version of the package.
        """
        name = type(self).__name__
        loading_for, self._loading_for = self._loading_for, None
        if loading_for not in (None, "fit"):
            return  # trainer.validate(ckpt_path=...) between two fits must not restore an earlier state
        with self.reading_state():
            if not isinstance(state_dict, dict):
                raise TypeError(f"it is of type {type(state_dict).__name__}, not a dict")
            version = state_dict["version"]
            if not isinstance(version, int) or not 1 <= version <= _STATE_VERSION:
                raise ValueError(f"state version {version!r} is not known to this release (it reads {_STATE_VERSION})")
            saved, layers, extra = state_dict["arguments"], state_dict["layers"], state_dict["extra"]
            if not (isinstance(saved, dict) and isinstance(layers, dict) and isinstance(extra, dict)):
                raise TypeError("arguments, layers and extra must be dicts")
            if not all(isinstance(count, int) for count in layers.values()):
                raise TypeError("layers must hold numbers of filters")
            changed = {k: (saved[k], v) for k, v in self.arguments().items() if k in saved and saved[k] != v}
            self.load_extra_state(extra)
        self._restored_layers, self._restored = dict(layers), "hand" if loading_for is None else "trainer"
        kept = {key: reason for key, reason in self.kept_on_resume().items() if key in changed}
        self._kept_arguments = {key: changed[key][0] for key in kept}
        if used := {key: values for key, values in changed.items() if key not in kept}:
            self.arguments_changed({key: old for key, (old, _) in used.items()})
            listed = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in used.items())
            rank_zero_warn(f"{name} resumes with changed arguments, the new values are used: {listed}")
        if kept:
            listed = "; ".join(
                f"{key} stays {changed[key][0]!r}, not {changed[key][1]!r}: {why}" for key, why in kept.items()
            )
            rank_zero_warn(f"{name} resumes with arguments that the checkpoint decides. {listed}")

    @contextlib.contextmanager
    def reading_state(self) -> Iterator[None]:
        """Turn any error while a state is read into a report of damage, with the callback's name and the fix."""
        try:
            yield
        except DAMAGED as error:
            name = type(self).__name__
            raise ValueError(
                f"the checkpoint's state of {name} cannot be used: {describe_damage(error)}. Resume from another "
                f"checkpoint, or remove checkpoint['callbacks'][{self.state_key!r}] to start {name} afresh from these "
                f"weights"
            ) from error

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to resume if the file holds our state under another key. Lightning would silently ignore it."""
        saved = checkpoint.get("callbacks") or {}
        self._loading_for = trainer.state.fn if self.state_key in saved else None
        if trainer.state.fn != "fit":
            return
        present = {callback.state_key for callback in _callbacks(trainer)}
        ours = [key for key in saved if str(key).startswith(type(self).__qualname__ + "{") and key not in present]
        if self.state_key not in saved and ours:
            raise MisconfigurationException(
                f"the checkpoint holds the state of {type(self).__name__} for other layers, "
                f"{', '.join(map(repr, ours))}, while this run has {self.state_key!r}. Resume with the same include, "
                f"exclude and network, or remove the entry from checkpoint['callbacks'] to start it afresh"
            )
        if self.state_key not in saved:
            self._forget_fit()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remove the state of an earlier fit from a checkpoint if this fit failed before our ``setup``."""
        if trainer.state.fn == "fit" and not self._belongs_to(trainer):
            checkpoint.get("callbacks", {}).pop(self.state_key, None)

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters, and orders of callbacks that undo a mask. Forget other fits."""
        strategy = type(trainer.strategy)
        qualified = f"{strategy.__module__}.{strategy.__qualname__}"
        if qualified not in self.trusted_strategies:
            raise MisconfigurationException(
                f"{type(self).__name__} works on whole parameters and whole gradients and has not been shown to be "
                f"exact under {strategy.__name__}, which may shard them. Use strategy='ddp' or a single device; if "
                f"every rank holds whole tensors under it, add {qualified!r} to FilterCallback.trusted_strategies"
            )
        self.check_launcher(trainer)
        if stage == "fit" and (device := torch.get_default_device()).type != "cpu":
            raise MisconfigurationException(
                f"{type(self).__name__} makes tensors on the CPU, and torch.set_default_device or 'with torch.device' "
                f"makes them on {str(device)!r}. Call torch.set_default_device('cpu') before trainer.fit; Lightning "
                f"moves the network to its device by itself"
            )
        self._check_order(_callbacks(trainer))
        self._check_companions(_callbacks(trainer))
        if trainer.is_global_zero:
            warn_once_about_versions()
        if stage == "fit":
            # An earlier fit may have ended without our on_exception, if another callback's failed first.
            self._clean_up()
            goes_on = self._belongs_to(trainer) and trainer.global_step > 0
            if not goes_on and self._restored != "hand":
                self._trainer = trainer  # what an earlier fit left in this model is undone by reset
                try:
                    self._forget_fit()
                finally:
                    self._trainer = None
            self._fit_of = weakref.ref(trainer)

    def check_built(self, pl_module: pl.LightningModule, *, values: bool) -> None:
        """Refuse a network that does not exist yet in ``setup``, for callbacks that change it there.

        Args:
            pl_module: the module.
            values: parameters must have values.

        Raises:
            MisconfigurationException: there is no layer yet, or parameters have no values. (For parameters on meta
                Lightning's own clean-up then fails, too; its error has this one as context.)
        """
        name = f"{type(self).__name__} changes the network before its optimizers are made"
        if not any(parameter.dim() > 1 for parameter in pl_module.parameters()):
            raise MisconfigurationException(
                f"{name}, and {type(pl_module).__name__} has no layer by then: build the network in __init__, not in "
                f"setup or configure_model"
            )
        empty = [key for key, parameter in pl_module.named_parameters() if parameter.is_meta]
        if values and empty:
            raise MisconfigurationException(
                f"{name}, and {empty[0]!r} of {type(pl_module).__name__} has no values by then (device 'meta'): "
                f"construct the network on a real device"
            )

    def _belongs_to(self, trainer: pl.Trainer) -> bool:
        return self._fit_of is not None and self._fit_of() is trainer

    def _forget_fit(self) -> None:
        """Return to the state of a new object."""
        self.reset()
        self._kept_arguments = {}
        self.layers, self._restored, self._restored_layers, self._loading_for = {}, None, None, None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the reference to the fit's model: a weak reference cannot be pickled."""
        return {**self.__dict__, "_fit_of": None}

    def check_launcher(self, trainer: pl.Trainer) -> None:
        """Refuse a launcher whose child processes keep what the callback gives.

        ``trainer.fit`` calls nothing of a callback before it starts those processes. Call this before it, to be refused
        at once; otherwise :meth:`setup` does it in the children.

        Raises:
            MisconfigurationException: the strategy spawns or forks, and :attr:`lost_in_child_processes` says what would
                be lost.
        """
        launcher = getattr(trainer.strategy, "launcher", None)
        # By name: each of Lightning's namespaces has a class of its own.
        starts_children = any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(launcher).__mro__)
        if starts_children and self.lost_in_child_processes:
            method = getattr(launcher, "_start_method", "spawn")
            raise MisconfigurationException(
                f"{type(self).__name__} cannot be used with a launcher that trains in child processes (start method "
                f"{method!r}), because only weights come back from them: {self.lost_in_child_processes} would be lost. "
                f"Use strategy='ddp' in a script, started by itself or with torchrun; in a notebook use devices=1"
            )

    def _check_companions(self, callbacks: Sequence[object]) -> None:
        for callback in callbacks:
            # By name: each of Lightning's namespaces has a class of its own.
            for name in (cls.__name__ for cls in type(callback).__mro__):
                if name in self.refused_beside:
                    raise MisconfigurationException(
                        f"{type(self).__name__} cannot be used beside {name}: {self.refused_beside[name]}. Use one of "
                        f"the two, or one after the other"
                    )

    def _check_order(self, callbacks: Sequence[object]) -> None:
        if self.gradient_stage is None:
            return
        mine = next(i for i, callback in enumerate(callbacks) if callback is self)
        for callback in callbacks[mine + 1 :]:
            stage = getattr(callback, "gradient_stage", None)
            if stage is not None and stage < self.gradient_stage:
                raise MisconfigurationException(
                    f"{type(callback).__name__} must come before {type(self).__name__} in the list of callbacks: it "
                    f"changes gradients that {type(self).__name__} then masks or averages. Swap the two"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the layers. Wrappers, devices, restored weights and optimizers are final by now."""
        self._clean_up()
        self._trainer, self._failed = trainer, set()
        if not self._restored and trainer.global_step == 0:
            self.reset()
        self._resolve(trainer, pl_module)
        if self._restored_layers:
            self._check_restored_layers(self._restored_layers, dict(named_convolutions(pl_module)))
        self._restored, self._restored_layers = None, None
        (self.wait if self._waiting else self.prepare)(trainer, pl_module)

    def _check_restored_layers(self, saved: Mapping[str, int], present: Mapping[str, Conv]) -> None:
        # All layers of the network count, not only the chosen ones: a layer may be frozen by now.
        resolved = {name: filter_count(conv) for name, conv in present.items()}
        wrong = [name for name in saved if resolved.get(name, saved[name]) != saved[name]]
        missing = [name for name in saved if name not in resolved]
        if wrong or missing:
            parts = [f"{name} had {saved[name]} filters, now {resolved[name]}" for name in wrong[:3]]
            parts += [f"{name} is gone" for name in missing[:3]]
            raise MisconfigurationException(
                f"the checkpoint's state of {type(self).__name__} belongs to a different network: {'; '.join(parts)}. "
                f"Resume with the network it was saved from, or without this checkpoint"
            )

    def _resolve(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        chosen = self.choose(pl_module)
        left_alone: list[str] = []
        if self.trainable_only:
            owned = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
            left_alone = [n for n, c in chosen.items() if not c.weight.requires_grad or id(c.weight) not in owned]
        self.layers = {name: conv for name, conv in chosen.items() if name not in left_alone}
        self._trainable = self._trainable_signature(trainer)
        self._waiting = not self.layers and self.waits_for_layers
        if self._waiting:
            rank_zero_info(
                f"{type(self).__name__}: all {len(left_alone)} selected convolutions are frozen or in no optimizer "
                f"(first: {left_alone[0]!r}). It starts at the epoch in which one is unfrozen"
            )
            return
        if not self.layers:
            raise NoLayersError(
                f"{type(self).__name__}: all {len(left_alone)} selected convolutions are frozen or in no optimizer "
                f"(first: {left_alone[0]!r}). Unfreeze some, or select others with include"
            )
        self._check_overlap(_callbacks(trainer))
        count = sum(filter_count(conv) for conv in self.layers.values())
        note = f" ({len(left_alone)} frozen or unoptimized layers left alone)" if left_alone else ""
        rank_zero_info(f"{type(self).__name__}: {len(self.layers)} layers, {count} filters{note}")

    def _check_overlap(self, callbacks: Sequence[object]) -> None:
        if self.shares_layers:
            return
        for other in callbacks:
            if other is self or not isinstance(other, FilterCallback) or other._method() is not self._method():
                continue
            if shared := [name for name in self.layers if name in other.layers]:
                mine, its = type(self).__name__, type(other).__name__
                raise MisconfigurationException(
                    f"{f'two {mine} callbacks' if mine == its else f'{its} and {mine} both'} act on layer {shared[0]!r}"
                    f"{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}; "
                    f"give them disjoint layers with include and exclude"
                )

    @classmethod
    def _method(cls) -> type:
        """Return the class of this package that a user's class derives from."""
        lineage = [base for base in cls.__mro__ if issubclass(base, FilterCallback)]
        return lineage[max(0, len(lineage) - 2)]

    @staticmethod
    def _trainable_signature(trainer: pl.Trainer) -> tuple[tuple[int, bool], ...]:
        groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        return tuple((id(p), p.requires_grad) for group in groups for p in group)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find, once per epoch, layers that were unfrozen or added to an optimizer (backbone finetuning)."""
        for steps in self._steps.values():
            steps.forget_broken_off()
        if batch_idx == 0 and self.trainable_only and self._trainable_signature(trainer) != self._trainable:
            self._clean_up()
            self._trainer = trainer
            self._resolve(trainer, pl_module)
            (self.wait if self._waiting else self.prepare)(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Announce the step to :meth:`before_step`; see :mod:`lightning_filterdiv.training.steps`."""
        if not self._steps:
            return
        index = optimizer_index(trainer, optimizer)
        if (steps := self._steps.get(index)) is not None:
            (self.repeated_step if steps.announce() else self.before_step)(index)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare ranks, if asked to."""
        every = self.check_ranks_every_n_steps
        if every and trainer.global_step % every == 0:
            check_ranks_agree(self.touched_tensors(), f"after step {trainer.global_step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the fit ends without a trainable layer."""
        if self._waiting:
            rank_zero_warn(
                f"{type(self).__name__} did nothing at the end of this fit: all selected convolutions are frozen or in "
                f"no optimizer. Unfreeze some and hand them to the optimizer, or select others with include"
            )

    def _clean_up(self) -> None:
        for steps in self._steps.values():
            steps.release()
        self._steps = {}
        self.release()
        self._trainer, self._waiting = None, False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Clean up, because Lightning calls no ``teardown`` after an exception. The state stays complete for a
        checkpoint.

        The next fit of the same object forgets that state in :meth:`setup`.
        """
        self._clean_up()
        self._name_refusal(trainer, exception)
        self._loading_for = None
        if self._restored == "hand" and trainer.state.fn == "fit":
            self._restored = "trainer"  # it was for this fit

    def _name_refusal(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Let the error of child processes say why they were refused; its text is a traceback of one of them."""
        if isinstance(exception, ProcessRaisedException):
            try:
                self.check_launcher(trainer)
            except MisconfigurationException as refused:
                if str(refused) in str(exception):
                    exception.args = (str(refused),)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave model and optimizers as they would be without the callback."""
        self._clean_up()
