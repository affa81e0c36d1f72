"""Sessions of one world, many to a forward pass: what `WorldModelEnv` does, for whoever asks in the same round.

One thread at a time comes here. A session's state is a row of a batch (`Slot`); sessions that keep stepping together
stay together, and nothing is copied from round to round.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from envs.options import (
    EnvOptions,
    batch_of_one,
    check_actions,
    check_max_chunks,
    check_reset_options,
    load_world,
)
from envs.serving.actions import decode_action
from envs.serving.batches import (
    Batch,
    Slot,
    first_row,
    held_bytes,
    kinds,
    row_bytes,
    stacked,
    together,
)
from envs.serving.health import trim_memory
from envs.serving.protocol import (
    MAX_DRAWS,
    Request,
    ServingError,
)
from envs.serving.rows import Imagination, Row, Session
from envs.serving.worker import Finished, Job, Outcome, internal_error
from envs.snapshot import check_snapshot, continue_snapshot
from envs.turn import (
    begin,
    child_stream,
    choose_start,
    chunks_apart,
    real_chunk,
    session_seed,
    turns,
)
from worldmodel import Chunk, InputError, WorldModel, WorldState

TRIM = 10.0  # seconds at least from one return of freed memory to the next
SCORED = ("log_prob", "rate", "bits_per_dim", "action_gain", "noise_square")


class WorldBackend:
    """Sessions of ``world``; see `envs.serving.worker.Backend`."""

    def __init__(self, world: WorldModel) -> None:
        spec = world.spec
        self.world = world
        self.facts: Mapping[str, Any] = {
            "world": spec.name,
            "fingerprint": world.fingerprint,
            "frame_size": list(spec.frame_size),
            "chunk_frames": world.chunk_frames,
            "latent_shape": list(world.latent_shape),
            "fps": float(spec.fps),
            "sampling": {
                "guidance": float(spec.sampling.guidance),
                "temperature": float(spec.sampling.temperature),
                "context": spec.sampling.context,
            },
        }
        self.action_space = json.dumps(spec.action_space_json).encode()
        self._sessions: dict[bytes, Session] = {}
        self._snapshots: dict[bytes, Session] = {}
        self._plans: list[Imagination] = []
        self._row_bytes = row_bytes(world.reset([0])[0].gathered())
        self.session_bytes = 2 * self._row_bytes + 3 * math.prod(world.frames_shape)  # see `Batch.thin`
        self._closed = False
        self._next_trim = 0.0

    @property
    def going_on(self) -> bool:
        """Whether an imagination has chunks to go."""
        return bool(self._plans)

    def short(self, request: Request) -> bool:
        """Whether nothing is computed for it: frames of a chunk that is there already."""
        session = self._sessions.get(request.session or b"")
        return session is not None and (
            request.op == "attach" or (request.op == "step" and not session.turn.over)
        )

    def run(self, jobs: Sequence[Job]) -> list[Finished]:
        """One round. Sessions that ask for the same kind of thing share a forward pass."""
        finished: list[Finished] = []
        groups: dict[tuple[Any, ...], list[Row]] = {}
        batches = [s.slot.batch for s in map(self._sessions.get, _sessions(jobs)) if s is not None]
        for job in jobs:
            if job.request.op != "imagine" and (refusal := job.begin(time.monotonic())):
                finished.append((job, refusal))
                continue
            try:
                outcome = self._prepare(job)
            except Exception as error:
                finished.append((job, _failure(error)))
                continue
            if isinstance(outcome, Row):
                groups.setdefault(outcome.key, []).append(outcome)
            elif outcome is not None:
                finished.append((job, outcome))
        for row in self._plan_rows(finished):
            groups.setdefault(row.key, []).append(row)
        for rows in groups.values():
            finished += self._pass(rows)
        for batch in dict.fromkeys(batches):
            batch.thin(self._row_bytes)
        self._closed |= any(job.request.op in ("close", "discard") for job in jobs)
        if self._closed and time.monotonic() >= self._next_trim:
            trim_memory()
            self._closed, self._next_trim = False, time.monotonic() + TRIM
        return finished

    # ---- one job, before the forward pass --------------------------------------------------------------------
    def _prepare(self, job: Job) -> Row | Outcome | None:
        """What the job asks of a forward pass, or its outcome where it needs none (None: in rounds to come)."""
        request = job.request
        if request.op == "create":
            return self._start_row(job, self._fresh(request))
        if request.op == "discard":
            self._snapshots.pop(request.args.get("snapshot", b""), None)
            return Outcome()
        session = self._sessions.get(request.session or b"")
        if session is None:
            raise ServingError("no_session", "no such session; create one")
        if request.op == "close":
            del self._sessions[request.session or b""]
            return Outcome()
        if request.op == "reset":
            return self._start_row(job, session)
        if request.op == "step":
            return self._step_row(job, session)
        if request.op in ("observe", "score"):
            return self._real_row(job, session)
        if request.op == "imagine":
            self._plans.append(Imagination.of(job, session))
            return None
        return self._at_once(job, session)

    def _at_once(self, job: Job, session: Session) -> Outcome:
        request = job.request
        if request.op == "attach":
            return self._show(session, request)
        if request.op == "snapshot":
            alone = session.slot if session.slot.batch.state.rows == 1 else _one(session.slot.state())
            self._snapshots[job.made[0]] = replace(session, slot=alone, rng=copy.deepcopy(session.rng))
            return Outcome({"snapshot": job.made[0], "nbytes": held_bytes(alone.batch.state)})
        if request.op == "restore":
            snapshot = self._snapshot(request)
            moment = snapshot.snapshot()
            check_snapshot(session.world, moment, session.options)
            after = replace(
                snapshot,
                slot=_one(session.world.adopt(moment.state)),
                world=session.world,
                options=session.options,
                max_chunks=session.max_chunks,
                rng=copy.deepcopy(snapshot.rng),
            )
            self._sessions[request.session or b""] = after
            return self._show(after, request)
        if request.op == "fork":
            states = session.slot.state().fork(len(job.made))
            for i, (name, slot) in enumerate(zip(job.made, Batch(states).slots(), strict=True)):
                rng = np.random.Generator(np.random.PCG64())
                rng.bit_generator.state = child_stream(session.rng, states.select([i]), i)
                self._sessions[name] = replace(session, slot=slot, rng=rng)
            shown = self._show(session, request)
            return replace(shown, result={**shown.result, "sessions": list(job.made)})
        raise ServingError("unsupported", f"this server does not do {request.op}")

    def _fresh(self, request: Request) -> Session:
        """A session that has not begun: options checked, and no past."""
        given = request.args
        options = EnvOptions(
            step_mode=given.get("step_mode", "chunk"),
            observation=given.get("observation", "pixels"),
            termination_threshold=float(given.get("termination_threshold", 0.5)),
            **{k: given[k] for k in ("guidance", "temperature", "context") if k in given},
        )
        rng = seeding.np_random(None)[0]
        bare: Any = None
        horizon = check_max_chunks(given.get("max_chunks"))
        return Session(load_world(self.world, options), options, horizon, bare, bare, bare, rng)

    def _start_row(self, job: Job, session: Session) -> Row | Outcome:
        """A session's first chunk; see `WorldModelEnv.reset`."""
        request = job.request
        seed = request.args.get("seed")
        rng = copy.deepcopy(session.rng) if seed is None else _stream(seed)
        source: dict[str, Any] = {
            k: request.args[k] for k in ("start", "bank_index", "prompt") if k in request.args
        }
        source |= {k: np.asarray(v) for k, v in request.arrays.items()}
        if "snapshot" in request.args:
            source["snapshot"] = self._snapshot(request).snapshot()
        source = check_reset_options(source)
        if "snapshot" in source:
            state, turn, chunk, rng = continue_snapshot(
                session.world, source["snapshot"], session.options, None if seed is None else rng
            )
            return self._enter(job, replace(session, slot=_one(state), turn=turn, chunk=chunk, rng=rng))
        start = choose_start(session.world, source, rng)
        key = ("start", session.world.spec.sampling)
        return Row(job, key, replace(session, rng=rng), start=start, seed=session_seed(rng))

    def _step_row(self, job: Job, session: Session) -> Row | Outcome:
        given = _action(job.request)
        action = self._lifted(session, given)
        if not session.turn.over:
            return self._enter(job, replace(session, turn=session.turn.next_frame()), given)
        return Row(job, ("step", session.world.spec.sampling, kinds(action)), session, action)

    def _real_row(self, job: Job, session: Session) -> Row:
        request = job.request
        left = len(session.turn.frames) - session.turn.shown
        if request.op == "observe" and left:
            raise InputError(f"{left} frames of this chunk are still to show; step on first")
        if "frames" not in request.arrays:
            raise InputError(f"{request.op} takes the frames of a chunk")
        frames = real_chunk(session.world, request.arrays["frames"])
        given = _action(request)
        action = None if given is None else self._lifted(session, given)
        draws = int(request.args.get("draws", 1))
        if not 1 <= draws <= MAX_DRAWS:
            raise InputError(f"draws is {draws}, expected 1 to {MAX_DRAWS}")
        key = (request.op, session.world.spec.sampling, kinds(action), draws)
        return Row(job, key, session, action, frames, draws=draws)

    def _plan_rows(self, finished: list[Finished]) -> list[Row]:
        """The next chunk of each imagination that goes on."""
        rows, kept = [], []
        for plan in self._plans:
            now = -math.inf if plan.chunks else time.monotonic()  # what has begun has met its deadline
            last = len(plan.chunks) == plan.horizon - 1
            if refusal := plan.job.begin(now) if last else plan.job.refusal(now):
                finished.append((plan.job, refusal))
                continue
            rows.append(plan.row())
            kept.append(plan)
        self._plans = kept
        return rows

    def _lifted(self, session: Session, action: Any) -> Any:
        """One action as a batch of one, checked alone, so that it cannot fail for others."""
        batch = batch_of_one(session.world.spec.action_space, action)
        check_actions(session.world, batch, 1)
        return batch

    def _snapshot(self, request: Request) -> Session:
        snapshot = self._snapshots.get(request.args.get("snapshot", b""))
        if snapshot is None:
            raise ServingError("no_session", "no such snapshot; it was discarded, or is another key's")
        return snapshot

    # ---- the forward pass ------------------------------------------------------------------------------------
    def _pass(self, rows: Sequence[Row]) -> list[Finished]:
        """One forward pass for all rows; if it fails, one for each, so that none suffers for another."""
        compute: Mapping[str, Callable[[Sequence[Row]], list[Finished]]] = {
            "start": self._begin,
            "step": self._step,
            "observe": self._observe,
            "score": self._score,
        }
        try:
            return compute[rows[0].key[0]](rows)
        except Exception as error:
            if len(rows) > 1:
                return [done for row in rows for done in self._pass([row])]
            self._plans = [plan for plan in self._plans if plan is not rows[0].plan]
            return [(rows[0].job, _failure(error))]

    def _begin(self, rows: Sequence[Row]) -> list[Finished]:
        starts = [row.start for row in rows if row.start is not None]
        state, chunk = begin(rows[0].session.world, starts, [row.seed for row in rows])
        return self._commit(rows, state, chunk, list(range(len(rows))), at_reset=True)

    def _step(self, rows: Sequence[Row]) -> list[Finished]:
        state, place, actions = self._gather(rows)
        state, chunk = rows[0].session.world.step(state, actions)
        return self._commit(rows, state, chunk, place)

    def _observe(self, rows: Sequence[Row]) -> list[Finished]:
        state, place, actions = self._gather(rows)
        state, chunk = rows[0].session.world.observe(state, _frames(rows, place), actions)
        return self._commit(rows, state, chunk, place)

    def _score(self, rows: Sequence[Row]) -> list[Finished]:
        state, place, actions = self._gather(rows)
        score = rows[0].session.world.score(state, _frames(rows, place), actions, rows[0].draws)
        results = [{name: float(getattr(score, name)[b]) for name in SCORED} for b in place]
        if not all(math.isfinite(x) for result in results for x in result.values()):
            raise ValueError("a score that is not finite")
        return [(row.job, Outcome(result)) for row, result in zip(rows, results, strict=True)]

    def _gather(self, rows: Sequence[Row]) -> tuple[WorldState, list[int], Any]:
        """One state, which row of it each job is, and the actions in that order."""
        state, place = together([row.session.slot for row in rows])
        order = np.argsort(place)
        return state, place, stacked([rows[i].action for i in order])

    def _commit(
        self,
        rows: Sequence[Row],
        state: WorldState,
        chunk: Chunk,
        place: Sequence[int],
        at_reset: bool = False,
    ) -> list[Finished]:
        """New sessions from a pass, once all of them are known to be sound."""
        finite = [chunk.log_prob, chunk.action_gain, chunk.reward, chunk.termination, chunk.latent]
        if not all(bool(x.isfinite().all()) for x in finite):
            raise ValueError("the model returned a value that is not finite")
        slots = Batch(state).slots()
        counts = [0 if at_reset else int(row.session.turn.info["chunk"]) + 1 for row in rows]
        each = chunks_apart(chunk)
        finished: list[Finished] = []
        entered: list[tuple[Job, Session, Outcome]] = []
        for i, (row, b) in enumerate(zip(rows, place, strict=True)):
            alone = each[b]
            if row.plan is not None:
                done = row.plan.took(slots[b], alone)
                if done is not None:
                    self._plans.remove(row.plan)
                    finished.append((row.job, done))
                continue
            old = row.session
            turn = turns(alone, [counts[i]], [old.max_chunks], old.options)[0]
            if row.key[0] == "observe":
                turn = replace(turn, shown=len(turn.frames))
            after = replace(old, slot=slots[b], turn=turn, chunk=alone)
            action = None if row.action is None else first_row(row.action)
            entered.append((row.job, after, self._show(after, row.job.request, action)))
        for job, session, outcome in entered:
            self._sessions[_name(job)] = session
            finished.append((job, outcome))
        return finished

    # ---- after it --------------------------------------------------------------------------------------------
    def _enter(self, job: Job, session: Session, action: Any = None) -> Outcome:
        """Make this the session from here on."""
        outcome = self._show(session, job.request, action)
        self._sessions[_name(job)] = session
        return outcome

    def _show(self, session: Session, request: Request, action: Any = None) -> Outcome:
        """A session's turn as a reply; arrays are never written to again."""
        turn, options = session.turn, session.options
        reward, terminated, truncated = turn.verdict(options)
        if request.op == "observe":
            reward = turn.reward
        new = turn.new_frames(options)
        observation = turn.latent if options.observation == "latent" else new
        if options.step_mode == "frame":
            observation = new[0]
        arrays = {"observation": observation}
        for name in request.args.get("want", ()):
            value = getattr(session.chunk, name)[0].cpu().numpy()
            arrays[name] = turn.frames if name == "frames" else value
        result = {
            "reward": float(reward),
            "terminated": terminated,
            "truncated": truncated,
            "info": turn.info,
        }
        return Outcome(result, arrays, new, action)


def _one(state: WorldState) -> Slot:
    return Batch(state).slots()[0]


def _sessions(jobs: Sequence[Job]) -> list[bytes]:
    return [job.request.session for job in jobs if job.request.session is not None]


def _name(job: Job) -> bytes:
    """The session that a job makes or changes."""
    return job.made[0] if job.request.op == "create" else job.request.session or b""


def _stream(seed: int) -> np.random.Generator:
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed {seed} is out of range; expected an integer in [0, 2^63)")
    return seeding.np_random(seed)[0]


def _failure(error: Exception) -> ServingError:
    """What a client hears: its own mistake as it is, ours as ``internal``."""
    if isinstance(error, ServingError):
        return error
    return ServingError("invalid", str(error)) if isinstance(error, InputError) else internal_error(error)


def _action(request: Request) -> Any:
    return decode_action(request.arrays, request.args.get("text", {}))


def _frames(rows: Sequence[Row], place: Sequence[int]) -> np.ndarray:
    return np.stack([rows[i].frames for i in np.argsort(place)])
