"""TrainState: everything that training changes, saved and resumed in a few lines. Sits on top of Checkpointer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from distckpt import Checkpointer, LoadReport, PendingSave, PerRank, SaveReport
from distckpt.contents import Contents
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, CheckpointNotFoundError, MismatchError
from distckpt.filling import DeviceOf
from distckpt.index import OnChange
from distckpt.training.base_checkpoint import BaseCheckpoint
from distckpt.training.data_position import DataPosition
from distckpt.training.environment import Differences
from distckpt.training.learning_rate import (
    check_learning_rate,
    follow_schedulers,
    note_initial_rates,
    override_learning_rate,
    unset_overrides,
)
from distckpt.training.progress import CheckMode, Progress
from distckpt.training.random_state import Generator
from distckpt.training.random_streams import RandomStreams
from distckpt.training.resume_check import HISTORY_STEPS, ResumeVerdict
from distckpt.training.resume_report import ResumeReport
from distckpt.training.run_record import RunRecord, stored_arguments
from distckpt.training.sections import LOADED, SECTIONS, Parts, SectionLoad, saved_sections, weights_template

logger = logging.getLogger("distckpt")
_OF_RATES = frozenset(("optimizer", "scheduler"))  # sections that have a part in the learning rate
T = TypeVar("T")


class TrainState:
    """A job's model, optimizer, schedule, data position, random streams and progress, as one thing to save and resume.

        train = TrainState(model, optimizer, scheduler=scheduler, dataloader=loader)
        with Checkpointer("checkpoints", keep_last=3) as ckpt:
            train.resume(ckpt)
            for batch in train.batches():
                ...
                train.end_step(loss=loss)
                if train.step % 1000 == 0:
                    train.async_save(ckpt)

    model: plain, DistributedDataParallel, fully_shard / DTensor, compiled, or one that has a sharded_state_dict(), as
    Megatron's; or several by name. Names are the author's: what wrappers put into them is left out. optimizer: made of
    these models' parameters; or several by name; or one that has a sharded_state_dict(model's, is_loading=...), as
    Megatron's. Its state is stored by parameter name. scheduler, scaler, and what extra holds: objects with
    state_dict() and load_state_dict(); in extra anything else that a state may hold too. dataloader: see DataPosition;
    data_axes: mesh axes whose ranks read different data, for loaders that keep one rank's position.

    generators: name -> torch, NumPy or Python generator, beside the process's own streams. rng_axes, rng_on_change:
    mesh axes whose ranks draw different numbers, and what a load does if one of them has another size: "reseed",
    "exact" (an error) or "skip". A generator in a PerRank has its own.

    assets: name -> file or directory (a tokenizer, a config), stored to the byte with every checkpoint and compared on
    resume. arguments: the job's hyper-parameters, recorded and compared on resume. base: of an adapter: what the frozen
    rest is, from load_weights() or BaseCheckpoint.of_files(); only what is trainable is stored then.
    resume_check: what happens when the first steps after a resume do not look like a continuation: "warn", "error"
    or "off". history: the number of last steps that are kept for that. coordinator: as Checkpointer's, but another one;
    closed by the caller.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: object | None = None,
        *,
        scheduler: object | None = None,
        scaler: object | None = None,
        dataloader: object | None = None,
        extra: dict[str, object] | None = None,
        generators: Mapping[str, Generator | PerRank] | None = None,
        rng_axes: tuple[str, ...] | None = None,
        rng_on_change: OnChange = "reseed",
        data_axes: tuple[str, ...] | None = None,
        assets: Mapping[str, str | PathLike[str]] | None = None,
        arguments: object | None = None,
        base: BaseCheckpoint | None = None,
        resume_check: CheckMode = "warn",
        history: int = HISTORY_STEPS,
        coordinator: Coordinator | None = None,
    ) -> None:
        self._parts = Parts(
            models=_by_prefix(model),
            optimizers=_by_prefix(optimizer),
            scheduler=scheduler,
            scaler=scaler,
            position=None if dataloader is None else DataPosition(dataloader, data_axes),
            streams=RandomStreams(rng_axes, rng_on_change, generators or {}),
            extra=extra,
            trainable_only=base is not None,
        )
        note_initial_rates(self._parts.schedulers())
        self._loader = dataloader
        self._coordinator = coordinator
        self._iterator: Iterator[object] | None = None  # in an epoch
        self._is_fresh = False  # a position was loaded, and no batch given since
        self._is_in_hand = False  # a batch was given to the loop, which has not said what became of it
        self._has_given = False  # batches come from batches()
        # Step and data position at the last save or load; a loader's own is not asked for before it is needed.
        sampler = None if self._parts.position is None else self._parts.position.sampler
        counted: object = None if sampler is None else (sampler.epoch, sampler.consumed_samples)
        self._position = 0, counted
        self._record = RunRecord(
            self._parts, arguments=arguments, assets=assets or {}, base=base, coordinator=coordinator
        )
        self._progress = Progress(self._parts.torch_optimizers(), resume_check, history, coordinator)

    @property
    def step(self) -> int:
        """Steps of the optimizer that this run has made, those before a resume included."""
        return self._progress.step

    @property
    def micro_step(self) -> int:
        """Batches of the step under way that have been accumulated."""
        return self._progress.micro_step

    @property
    def verdict(self) -> ResumeVerdict:
        """What the steps since the resume say of it."""
        return self._progress.verdict

    # The loop

    def batches(self) -> Iterator[object]:
        """Batches of the dataloader from the position on, epoch after epoch, without end; after a load, from there.

        Loops that are left and begun anew go on where the last one was. A batch counts as consumed once it is given to
        the loop, which then calls end_step() or end_micro_step() before it saves. Raises CheckpointError if there is
        no batch at all.
        """
        sampler = None if self._parts.position is None else self._parts.position.sampler
        while True:
            goes_on = self._iterator is not None or self._goes_on_with_an_epoch()
            iterator = self._iterator = self._begin(goes_on) if self._iterator is None else self._iterator
            is_empty = not goes_on  # The rest of an epoch may be.
            while self._iterator is iterator:  # After a load the position is another one.
                try:
                    batch = next(iterator)
                except StopIteration:
                    self._iterator = None
                    break
                is_empty = False
                self._progress.see_batch(batch)
                if sampler is not None:
                    sampler.advance()
                self._has_given = self._is_in_hand = True
                yield batch
            if is_empty and self._iterator is None:
                raise CheckpointError("batches(): the dataloader has no batch at all")

    def _goes_on_with_an_epoch(self) -> bool:
        """Whether iterating gives the rest of an epoch, which was begun before."""
        sampler = None if self._parts.position is None else self._parts.position.sampler
        is_fresh, self._is_fresh = self._is_fresh, False
        return is_fresh if sampler is None else sampler.consumed_samples > 0

    def _begin(self, goes_on: bool) -> Iterator[object]:
        """Batches to the end of an epoch.

        A DataLoader draws from the process's random stream whenever it is iterated. A new epoch is to have numbers of
        its own; the rest of one leaves no trace in the stream, as a run that is not interrupted does not draw then.
        """
        if not isinstance(self._loader, Iterable):
            raise CheckpointError("batches(): this TrainState was given no dataloader that can be iterated")
        if not goes_on:
            return iter(self._loader)
        random_state = torch.get_rng_state()
        try:
            return iter(self._loader)
        finally:
            torch.set_rng_state(random_state)

    def end_micro_step(self) -> None:
        """A batch was accumulated and more are to come before the optimizer's step: gradients are saved with it."""
        self._is_in_hand = False
        self._progress.end_micro_step()

    def end_step(
        self,
        *,
        loss: float | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
        learning_rates: Sequence[float] | None = None,
        batch: object = None,
    ) -> None:
        """The optimizer has made a step. On all ranks; what of it is not known is None.

        loss, grad_norm: of all ranks where that is known: those of rank 0 are recorded. learning_rates: those the step
        used, for optimizers that are not torch's. batch: the first that it trained on, for loops that do not take
        theirs from batches(). The fifth call after a resume is collective.

        Raises ResumeCheckFailed on all ranks if resume_check is "error", DistributedError.
        """
        if batch is not None:
            self._progress.see_batch(batch)
        self._is_in_hand = False
        self._progress.end_step(loss, grad_norm, learning_rates)

    # Saving

    def save(
        self,
        ckpt: Checkpointer,
        *,
        sections: Collection[str] = SECTIONS,
        metrics: Mapping[str, float] | None = None,
        metadata: object = None,
    ) -> SaveReport:
        """Checkpointer.save of this state, as the iteration of its step; durable on return.

        sections: what of it; with less than all no job can be resumed from it. metrics, metadata: of the checkpoint.
        """
        record = self._record_of(sections, metadata)
        state = partial(self._state, ckpt.rank, sections)
        return ckpt.save(state, iteration=self.step, metadata=record, metrics=metrics)

    def async_save(
        self,
        ckpt: Checkpointer,
        *,
        snapshot: Literal["eager", "lazy"] = "eager",
        sections: Collection[str] = SECTIONS,
        metrics: Mapping[str, float] | None = None,
        metadata: object = None,
    ) -> PendingSave:
        """Checkpointer.async_save of this state. A lazy snapshot guards the optimizers."""
        record = self._record_of(sections, metadata)
        state = partial(self._state, ckpt.rank, sections)
        if snapshot == "lazy":
            for optimizer in self._parts.torch_optimizers():
                ckpt.guard(optimizer)
        return ckpt.async_save(state, iteration=self.step, metadata=record, metrics=metrics, snapshot=snapshot)

    def _record_of(self, sections: Collection[str], metadata: object) -> dict[str, object]:
        """The metadata of a checkpoint that holds these sections."""
        _check_collection("sections", sections, SECTIONS)
        of_job = self._parts.sections() | {"progress"}
        of_job |= {"assets"} if self._record.asset_files else set()
        of_job |= {"gradients"} if self.micro_step else set()
        return self._record.metadata(of_job & set(sections), of_job - set(sections), metadata)

    def _state(self, rank: int, sections: Collection[str]) -> dict[str, object]:
        """To be saved. Called where a failure of one rank becomes known on all."""
        self._check_position()
        state = saved_sections(self._parts, self.micro_step)
        state["progress"] = self._progress.state(rank)
        if rank == 0 and self._record.asset_files:
            state["assets"] = self._record.asset_files
        return {name: part for name, part in state.items() if name in sections}

    def _check_position(self) -> None:
        """Raises CheckpointError if a resume would give data again, or leave some out."""
        if self._is_in_hand:
            raise CheckpointError(
                f"a batch was given to the loop after step {self.step}, and neither end_step() nor end_micro_step() "
                f"was called for it: a resume would leave it out. Save after one of them"
            )
        if self._progress.has_stepped:
            raise CheckpointError(
                f"the optimizer has made a step since step {self.step} ended, and end_step() was not called for it: a "
                f"resume would count it out. Call it after each step of the optimizer, ahead of a save"
            )
        counted = None if self._parts.position is None else self._parts.position.counted()
        if counted is None:
            return
        now, before = (self.step, counted), self._position
        if not self._has_given and now[0] > before[0] and now[1] == before[1]:
            raise CheckpointError(
                f"the data position stands still at {now[1]} since step {before[0]}, and this is step {now[0]}: a "
                f"resume would give the same data again. Take batches from batches(), or call the sampler's advance()"
            )
        self._position = now

    # Loading

    def resume(
        self,
        ckpt: Checkpointer,
        iteration: int | str | None = None,
        *,
        allow: Collection[str] = (),
        overrides: Mapping[str, object] | None = None,
        device: DeviceOf = "cpu",
        convert_dtypes: bool = False,
    ) -> ResumeReport | None:
        """load(), or None, with a warning, where no checkpoint was ever committed and none is near: the first start."""
        try:
            return self.load(
                ckpt, iteration, allow=allow, overrides=overrides, device=device, convert_dtypes=convert_dtypes
            )
        except CheckpointNotFoundError as error:
            if iteration is not None or error.candidates:
                raise
            if ckpt.rank == 0:
                logger.warning("this job starts at step 0: %s", error)
            return None

    def load(
        self,
        ckpt: Checkpointer,
        iteration: int | str | None = None,
        *,
        sections: Collection[str] = LOADED,
        allow: Collection[str] = (),
        overrides: Mapping[str, object] | None = None,
        device: DeviceOf = "cpu",
        convert_dtypes: bool = False,
    ) -> ResumeReport:
        """Go on where a checkpoint was saved. Collective.

        iteration: a number or selector, None is the newest good one. sections: what to load, all by default. allow:
        sections, and patterns of keys or of differences, that may begin anew, be left unread, or be other ones.
        overrides: arguments that are other ones on purpose; "lr" is set in optimizers and schedulers. They are recorded
        in what is saved from now on. device, convert_dtypes: as Checkpointer.load.

        Raises what Checkpointer.load raises; MismatchError for a section that is missing, or not asked for, for other
        data, assets, or another base of an adapter.
        """
        _check_collection("sections", sections, LOADED)
        _check_collection("allow", allow)
        overrides = overrides or {}
        load = SectionLoad(self._parts, sections, allow, self._progress.template, self._restore_progress)
        compared: list[tuple[Differences, float | None]] = []
        self._record.facts()  # Collective: not where one rank may fail ahead of the others.

        def template(contents: Contents) -> dict[str, object]:
            compared[:] = [self._compare(contents, sections, allow, overrides)]
            state = load.template(contents)
            _check_overridden(overrides, load.restoration.begun_anew)
            return state

        allowed = (*allow, *(f"{name}/*" for name in allow if name in SECTIONS))
        report = ckpt.load(template, iteration, allow=allowed, device=device, convert_dtypes=convert_dtypes)
        ((differences, factor),) = compared
        restored = load.restoration
        self._go_on(report, sections, overrides, factor, restored.begun_anew)
        unset = unset_overrides(overrides, self._parts.optimizers.values())
        resumed = ResumeReport(
            step=self.step,
            load=report,
            data=restored.data,
            begun_anew=tuple(restored.begun_anew),
            unread=tuple(restored.unread),
            differences=differences,
            warnings=(*restored.warnings, *unset, *_unused(allow, report, differences)),
        )
        if ckpt.rank == 0:
            _log(resumed)
        return resumed

    def _compare(
        self,
        contents: Contents,
        sections: Collection[str],
        allow: Collection[str],
        overrides: Mapping[str, object],
    ) -> tuple[Differences, float | None]:
        """What differs from the run that was saved, and by what learning rates are to be multiplied, if they are."""
        factor = check_learning_rate(
            overrides,
            self._parts.optimizers.values(),
            self._parts.schedulers(),
            stored=contents.tree.get("optimizer") if "optimizer" in sections else None,
            arguments=stored_arguments(contents),
        )
        return self._record.compare(contents, overrides, allow), factor

    def _go_on(
        self,
        report: LoadReport,
        sections: Collection[str],
        overrides: Mapping[str, object],
        factor: float | None,
        begun_anew: Collection[str],
    ) -> None:
        """After a load, on all ranks."""
        self._iterator, self._is_fresh = None, True
        self._is_in_hand = self._has_given = False
        if "progress" in sections:
            self._record.note_resume(report.save_id, report.iteration, overrides)
        if factor is not None:
            override_learning_rate(self._parts.optimizers.values(), self._parts.schedulers(), factor)
        if _OF_RATES & set(begun_anew):
            follow_schedulers(self._parts.schedulers())
        if factor is not None or _OF_RATES & set(begun_anew):
            self._progress.expect_learning_rates()
        self._progress.begin_check()

    def _restore_progress(self, progress: Mapping[str, object]) -> None:
        position = self._parts.position
        counted = None if position is None else position.counted()
        sampler = None if position is None else position.sampler
        # A loader that keeps one rank's position does not say where an epoch begins.
        is_start = sampler.consumed_samples == 0 if sampler is not None else position is not None and counted is None
        self._progress.restore(progress, at_epoch_start=is_start)
        self._position = self.step, counted

    def load_weights(
        self,
        root: str | PathLike[str],
        iteration: int | str | None = None,
        *,
        section: str = "model",
        allow: Collection[str] = (),
        device: DeviceOf = "cpu",
        convert_dtypes: bool = False,
    ) -> BaseCheckpoint:
        """The model's weights alone, to start a new run from at step 0. Collective. Nothing is saved under root.

        Returns what was loaded, to be the base of adapters. section: the path of the model in the checkpoint. allow:
        patterns of keys that may be missing (a new head) or left unread. Raises what Checkpointer.load raises.
        """
        _check_collection("allow", allow)
        digest = ""

        def template(contents: Contents) -> dict[str, object]:
            nonlocal digest
            digest = contents.digest
            return weights_template(self._parts, section, allow, contents)

        with Checkpointer(root, coordinator=self._coordinator) as source:
            report = source.load(template, iteration, allow=tuple(allow), device=device, convert_dtypes=convert_dtypes)
        return BaseCheckpoint(location=str(root), digest=digest, iteration=report.iteration, save_id=report.save_id)


def _by_prefix(given: T | Mapping[str, T] | None) -> dict[str, T]:
    """Several by their names; the only one under none."""
    if isinstance(given, Mapping):
        return dict(given)
    return {} if given is None else {"": given}


def _check_collection(what: str, given: Collection[str], known: Collection[str] = ()) -> None:
    """Raises ValueError for a text, which would be taken letter by letter, and for what is not known."""
    unknown = sorted(set(given) - set(known)) if known else []
    if isinstance(given, str) or unknown:
        of = f" of {', '.join(known)}" if known else ""
        raise ValueError(f"{what}={given!r}: expected a collection{of}")


def _check_overridden(overrides: Mapping[str, object], begun_anew: Collection[str]) -> None:
    """Raises MismatchError for a learning rate that is to be scaled from one that does not go on."""
    anew = sorted(_OF_RATES & set(begun_anew))
    if "lr" in overrides and anew:
        raise MismatchError(
            f"overrides: 'lr' is given, and the {' and '.join(anew)} of this job begins anew: it has the rate that it "
            f"was made with. Make it with the one that is wanted, and override nothing"
        )


def _unused(allow: Collection[str], report: LoadReport, differences: Differences) -> Iterator[str]:
    """Warnings of what was allowed and does not exist: a typing error allows nothing."""
    names = [*report.missing, *report.unexpected, *(entry.name for entry in differences.entries)]
    for pattern in allow:
        is_of_optimizer = pattern.startswith(("optimizer/", "schedulers."))  # They allow more than keys.
        if pattern not in SECTIONS and not is_of_optimizer and not any(fnmatchcase(name, pattern) for name in names):
            yield f"allow: nothing had to be allowed as {pattern!r}"


def _log(resumed: ResumeReport) -> None:
    logger.log(logging.INFO if resumed.is_whole else logging.WARNING, "%s", resumed)
    if resumed.differences.of("warn"):
        logger.warning("not all is as it was at the save:\n%s", resumed.differences.text())
