"""Which checkpoints stay: the rules, a naive restatement of them, and schedules of saves, roll-backs and crashes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt import Checkpointer, Retention, label
from distckpt.commit import TRACKER, Commit, Writer, list_commits, read_tracker, unsound_marker
from distckpt.pruning import prune, retire_superfluous
from distckpt.removing import sweep
from distckpt.retention import Facts, judge
from distckpt.testing import Crash, CrashingStorage, MemoryStorage
from tests.unit.protocol import Clock, save

NOW_S = 1_000_000.0
COMMITS = [Commit(1, seq, 10 * seq) for seq in range(1, 9)]


def kept(facts: list[Facts], policy: Retention, **options: object) -> list[int]:
    """The iterations that stay."""
    given = {"tracked": None, "now_unix_s": NOW_S} | options
    return sorted(v.commit.iteration for v in judge(facts, policy, **given) if v.stays)  # type: ignore[arg-type]


# One rule at a time


def test_without_rules_all_stay() -> None:
    assert kept([Facts(c) for c in COMMITS], Retention()) == [10, 20, 30, 40, 50, 60, 70, 80]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Retention(keep_last=2), [70, 80]),
        (Retention(keep_last=99), [10, 20, 30, 40, 50, 60, 70, 80]),
        (Retention(keep_every=30), [30, 60, 80]),
        (Retention(keep_best=("loss", 2, "min")), [10, 20, 80]),
        (Retention(keep_best=[("loss", 1, "max"), ("acc", 2, "max")]), [60, 70, 80]),
        (Retention(keep_younger_than_s=35), [60, 70, 80]),
        (Retention(keep_last=1, keep_every=40, keep_younger_than_s=15), [40, 80]),
        (Retention(keep_best=("unknown", 3, "min")), [80]),
    ],
)
def test_rule_keeps_what_it_says(policy: Retention, expected: list[int]) -> None:
    """loss rises from 1 to 7; acc is known of 10 (not finite), 60 and 70. They were saved 10 s apart."""
    acc = {10: None, 60: 0.5, 70: 0.25}
    facts = [
        Facts(
            c,
            created_unix_s=NOW_S - 10 * (9 - c.commit_seq),
            metrics=({"loss": float(c.commit_seq)} if c.iteration < 80 else {})
            | ({"acc": acc[c.iteration]} if c.iteration in acc else {}),
        )
        for c in COMMITS
    ]
    assert kept(facts, policy) == expected


def test_of_equal_metrics_the_newer_one_is_kept() -> None:
    facts = [Facts(c, metrics={"loss": 1.0}) for c in COMMITS]
    assert kept(facts, Retention(keep_best=("loss", 2, "min"))) == [70, 80]
    assert kept(facts, Retention(keep_best=("loss", 3, "max"))) == [60, 70, 80]


def test_pinned_checkpoint_is_never_superfluous() -> None:
    facts = [Facts(c, size_bytes=10, is_protected=c.iteration == 20) for c in COMMITS]
    assert kept(facts, Retention(keep_last=1, max_bytes=0)) == [20, 80]


def test_pinned_checkpoint_stays_when_its_iteration_is_saved_again() -> None:
    facts = [Facts(Commit(1, 1, 10), is_protected=True), Facts(Commit(1, 2, 10)), Facts(Commit(1, 3, 10))]
    verdicts = judge(facts, Retention(), tracked=10, now_unix_s=NOW_S)
    assert [(v.commit.commit_seq, v.stays) for v in verdicts] == [(3, True), (2, False), (1, True)]


def test_last_good_one_stays_when_all_newer_ones_are_unsound() -> None:
    facts = [Facts(c, size_bytes=10, is_sound=c.iteration <= 30) for c in COMMITS]
    assert kept(facts, Retention(keep_last=1, max_bytes=0)) == [30, 80]


@pytest.mark.parametrize("bad", [{"is_sound": False}, {"is_readable": False}])
def test_bad_checkpoint_takes_no_place(bad: Mapping[str, bool]) -> None:
    facts = [Facts(c, metrics={"loss": -c.iteration}, **(bad if c.iteration in (60, 70) else {})) for c in COMMITS]
    stay = kept(facts, Retention(keep_last=3, keep_best=("loss", 3, "min")))
    assert stay == ([40, 50, 80] if "is_sound" in bad else [40, 50, 60, 70, 80])


def test_unsound_checkpoint_goes_only_when_a_good_one_takes_its_place() -> None:
    older, unsound, newest = Facts(Commit(1, 1, 10)), Facts(Commit(1, 2, 20), is_sound=False), Facts(Commit(1, 3, 30))
    assert kept([older, unsound], Retention(keep_last=1)) == [10, 20]
    assert kept([older, unsound, newest], Retention(keep_last=1)) == [30]
    assert kept([older, unsound, newest], Retention()) == [10, 20, 30]
    newest_is_unsound = Facts(Commit(1, 3, 30), is_sound=False)
    assert kept([older, unsound, newest_is_unsound], Retention(keep_last=1)) == [10, 20, 30]
    again = [older, Facts(Commit(1, 2, 10), is_sound=False), newest]
    assert [v.stays for v in judge(again, Retention(), tracked=None, now_unix_s=NOW_S)] == [True, True, True]
    assert kept([older, unsound, newest, Facts(Commit(1, 4, 20))], Retention()) == [10, 20, 30]


def test_what_the_tracker_names_stays_even_if_unsound() -> None:
    facts = [Facts(c, is_sound=c.iteration != 20) for c in COMMITS]
    assert kept(facts, Retention(keep_last=1), tracked=20) == [20, 80]
    assert kept(facts, Retention(keep_last=1), tracked=30) == [30, 80]


def test_least_wanted_goes_first_when_bytes_are_short() -> None:
    """Unsound, then what only keep_last keeps, then every 30 and the best; each from the oldest."""
    facts = [
        Facts(c, size_bytes=10, is_sound=c.iteration != 70, metrics={"loss": 1.0 if c.iteration == 10 else 2.0})
        for c in COMMITS
    ]
    facts.append(Facts(Commit(1, 9, 5), size_bytes=10, is_sound=False))  # the newest
    policy = {"keep_last": 7, "keep_every": 30, "keep_best": ("loss", 1, "min")}
    leaves = [(80, [5, 10, 20, 30, 40, 50, 60, 80]), (70, [5, 10, 30, 40, 50, 60, 80]), (60, [5, 10, 30, 50, 60, 80])]
    leaves += [(50, [5, 10, 30, 60, 80]), (49, [5, 30, 60, 80]), (30, [5, 60, 80]), (20, [5, 80]), (0, [5, 80])]
    for max_bytes, expected in leaves:
        assert kept(facts, Retention(max_bytes=max_bytes, **policy)) == expected  # type: ignore[arg-type]


def test_bytes_alone_give_up_the_oldest_of_the_abandoned_branch_first() -> None:
    commits = [Commit(1, 1, 10), Commit(1, 2, 20), Commit(1, 3, 30), Commit(2, 4, 25)]
    order = [commits[3], commits[1], commits[0], commits[2]]  # 30 was abandoned for 25.
    facts = [Facts(c, size_bytes=10) for c in commits]
    assert kept(facts, Retention(max_bytes=30), order=order) == [10, 20, 25]
    assert kept(facts, Retention(max_bytes=20), order=order) == [20, 25]


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_last": 0},
        {"keep_every": 0},
        {"keep_every": -1},
        {"keep_best": ("loss", 0, "min")},
        {"keep_best": ("loss", 1, "low")},
        {"keep_best": ("loss", 1)},
        {"keep_best": [("", 1, "min")]},
        {"keep_younger_than_s": 0},
        {"keep_younger_than_s": float("nan")},
        {"max_bytes": -1},
    ],
)
def test_policy_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"keep_|max_bytes|metric"):
        Retention(**wrong)  # type: ignore[arg-type]


def test_keep_last_and_retention_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="both given"):
        Checkpointer(MemoryStorage(), keep_last=1, retention=Retention(keep_last=1))


def test_job_removes_what_its_policy_gives_up() -> None:
    storage = MemoryStorage()
    policy = Retention(keep_last=1, keep_every=20, keep_best=("loss", 1, "min"))
    with Checkpointer(storage, retention=policy, removal_grace_s=0) as checkpointer:
        for iteration, loss in ((10, 1.0), (20, 3.0), (30, 2.0), (40, 5.0), (50, 4.0)):
            checkpointer.save({"step": iteration}, iteration=iteration, metrics={"loss": loss})
        assert checkpointer.iterations() == [10, 20, 40, 50]
        label(storage, 10, metrics={"loss": 9.0})  # An evaluation says otherwise: 30 would have been best.
        checkpointer.save({"step": 60}, iteration=60, metrics={"loss": 6.0})
        assert checkpointer.iterations() == [20, 40, 60]


# Any schedule, against the policy said once more, naively


@dataclass
class Known:
    """A commit as the test knows it, whatever lies on the storage."""

    commit: Commit
    save_id: str
    parent: str | None
    loss: float | None
    age_s: float
    tagged: bool = False
    pinned: bool = False
    unsound: bool = False
    damaged: bool = False


@dataclass
class World:
    storage: MemoryStorage
    writer: Writer
    parent: str | None = None
    known: list[Known] = field(default_factory=list)
    tag_is_on: str | None = None


def naive(world: World, policy: Retention, sizes: Mapping[Commit, int], tracked: int | None) -> set[Commit]:
    """The policy once more: what stays, asked of each checkpoint by itself."""
    known = {k.commit: k for k in world.known}
    by_save = {k.save_id: k for k in world.known if not k.damaged}
    order: list[Commit] = []
    for commit in sorted(known, reverse=True):  # Each, then its ancestors.
        at: Known | None = known[commit]
        while at is not None and at.commit not in order:
            order.append(at.commit)
            at = by_save.get(at.parent or "") if not at.damaged else None
    good = [c for c in order if not known[c].damaged and not known[c].unsound]
    live = [c for c in good if not any(o.iteration == c.iteration and o > c for o in good)]
    best = sorted((known[c].loss, live.index(c)) for c in live if known[c].loss is not None)  # type: ignore[type-var]
    count = 0 if policy.keep_best is None else int(policy.keep_best[1])  # type: ignore[call-overload]
    is_best = [live[i] for _, i in best[:count]]
    has_rules = any(
        rule is not None for rule in (policy.keep_last, policy.keep_every, policy.keep_best, policy.keep_younger_than_s)
    )

    def is_strong(c: Commit) -> bool:
        return c in is_best or (policy.keep_every is not None and c.iteration % policy.keep_every == 0)

    def is_weak(c: Commit) -> bool:
        if not has_rules:
            return True
        young = policy.keep_younger_than_s is not None and known[c].age_s < policy.keep_younger_than_s
        return young or (policy.keep_last is not None and live.index(c) < policy.keep_last)

    def is_sacred(c: Commit) -> bool:
        of_tracked = [o for o in known if o.iteration == tracked]
        named = [o for o in of_tracked if o in live] or sorted(of_tracked)[-1:]
        return c == max(known) or c in good[:1] or c in named or known[c].tagged or known[c].pinned or known[c].damaged

    stay = {c for c in known if is_sacred(c) or (c in live and (is_strong(c) or is_weak(c)))}
    for c in known:
        if known[c].unsound and not known[c].damaged and not is_sacred(c):
            rivals = [o for o in live if o in stay] if has_rules else [o for o in live if o.iteration == c.iteration]
            if all(o < c for o in rivals):
                stay.add(c)
    if policy.max_bytes is not None:
        rest = [c for c in reversed(order) if c in stay and not is_sacred(c)]
        unsound = [c for c in rest if known[c].unsound]
        weak = [c for c in rest if c not in unsound and not is_strong(c)]
        strong = [c for c in rest if c not in unsound and is_strong(c)]
        for c in unsound + weak + strong:
            if sum(sizes[s] for s in stay) > policy.max_bytes:
                stay.remove(c)
    return stay


RULES: dict[str, st.SearchStrategy[object]] = {
    "keep_last": st.sampled_from((1, 2, 3)),
    "keep_every": st.sampled_from((2, 3)),
    "keep_best": st.sampled_from((("loss", 1, "min"), ("loss", 2, "min"))),
    "keep_younger_than_s": st.just(2500.0),
    "max_bytes": st.sampled_from((0, 2000, 4000)),
}
POLICIES = st.lists(st.sampled_from(sorted(RULES)), max_size=3, unique=True).flatmap(
    lambda names: st.builds(Retention, **{name: RULES[name] for name in names})
)
RECENT = st.sampled_from((0, 0, 0, 1, 1, 2, 3, 5, 9))  # counted back from the newest
LOSSES = st.sampled_from((None, 1.0, 2.0, 3.0))
EVENTS = st.one_of(
    st.tuples(st.sampled_from(("roll back", "tag", "pin", "unpin", "measure", "unsound", "damage")), RECENT),
    st.tuples(st.just("crash"), st.integers(1, 60)),
    st.tuples(st.just("nothing"), st.just(0)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=POLICIES,
    steps=st.lists(st.tuples(LOSSES, EVENTS, EVENTS), min_size=4, max_size=12),
    tracked=st.sampled_from((None, b"2", b"")),
    seed=st.integers(0, 3),
)
def test_any_schedule_leaves_exactly_what_the_policy_says_and_a_good_checkpoint(
    policy: Retention,
    steps: list[tuple[float | None, tuple[str, int], tuple[str, int]]],
    tracked: bytes | None,
    seed: int,
) -> None:
    """Each step is a save, and up to two things that happen after it. tracked: what somebody writes into the tracker.

    A crash strikes at a call of the clean-up after the next save: then the power is cut, and a new job goes on.
    """
    storage = MemoryStorage(clock=Clock())
    world = World(storage, Writer.claim(storage))
    iteration, crash_at = 0, 0
    for loss, *events in steps:
        iteration += 1
        save_one(world, iteration, loss)
        if tracked is not None:
            world.storage.replace(TRACKER, tracked)
        if crash_at:
            with_crash(world, policy, crash_at, seed)
            crash_at = 0
        clean_up_and_compare(world, policy)
        for what, value in events:
            to = world.known[-1 - value % len(world.known)]
            if what == "crash":
                crash_at = value
            elif what == "roll back":
                world.writer, world.parent, iteration = Writer.claim(world.storage), to.save_id, to.commit.iteration
            else:
                happen(world, what, to)
                clean_up_and_compare(world, policy)


def save_one(world: World, iteration: int, loss: float | None) -> None:
    age_s = 3000.0 if len(world.known) % 3 == 0 else 1000.0
    created = time.time() - age_s
    commit = Commit(world.writer.epoch, world.writer.commit_seq, iteration)
    save_id = save(
        world.writer,
        iteration,
        parent=world.parent,
        metrics={} if loss is None else {"loss": loss},
        created_unix_s=created,
    )
    world.known.append(Known(commit, save_id, world.parent, loss, age_s))
    world.parent = save_id


def happen(world: World, what: str, to: Known) -> None:
    """A label, or damage. Labels are of the newest commit of an iteration, unless they are put by hand."""
    newest = max(k.commit for k in world.known if k.commit.iteration == to.commit.iteration)
    if what == "unsound":
        world.storage.put_if_absent(unsound_marker(to.commit.iteration, to.save_id), b"")
        to.unsound = True
    elif what == "damage":
        if not any(k.commit.iteration == to.commit.iteration and k is not to for k in world.known) and not (
            to.tagged or to.pinned or to.unsound
        ):
            world.storage.replace(to.commit.name, b"damaged")
            to.damaged = True
    elif to.commit != newest or to.damaged:
        return
    elif what == "tag":
        label(world.storage, to.commit.iteration, add_tags=["best"])
        for other in world.known:
            other.tagged = other is to
    elif what in ("pin", "unpin"):
        label(world.storage, to.commit.iteration, pinned=what == "pin")
        to.pinned = what == "pin"
    elif what == "measure":
        label(world.storage, to.commit.iteration, metrics={"loss": 0.5})
        to.loss = 0.5


def with_crash(world: World, policy: Retention, crash_at: int, seed: int) -> None:
    """What has gone when the power is cut in the middle of cleaning up is of what was to go; a new job goes on."""
    before = expected(world, policy)
    crashing = CrashingStorage(world.storage, fail_at=crash_at, error=Crash())
    try:
        retire_superfluous(crashing, policy)
        sweep(crashing, grace_s=0)
    except Crash:
        world.storage = world.storage.power_cut(seed)
    assert before <= set(list_commits(world.storage))
    world.known = [k for k in world.known if k.commit in list_commits(world.storage)]
    world.writer = Writer.claim(world.storage)


def expected(world: World, policy: Retention) -> set[Commit]:
    report = prune(world.storage, Retention(), dry_run=True)
    sizes = {k.commit: 0 for k in world.known}
    for one in (*report.kept, *report.removed):
        sizes |= {k.commit: one.bytes for k in world.known if k.save_id == one.save_id}
    return naive(world, policy, sizes, read_tracker(world.storage))


def clean_up_and_compare(world: World, policy: Retention) -> None:
    had_good = any(not k.damaged and not k.unsound for k in world.known)
    stay = expected(world, policy)
    retire_superfluous(world.storage, policy)
    sweep(world.storage, grace_s=0)
    left = set(list_commits(world.storage))
    assert left == stay
    world.known = [k for k in world.known if k.commit in left]
    assert not had_good or any(not k.damaged and not k.unsound for k in world.known)
    for k in world.known:
        names = world.storage.list(k.commit.directory)
        assert k.damaged or f"shard-00000-of-00001-{k.save_id}.safetensors" in names
