"""`WorldModel`: weights and pure functions from one `WorldState` to the next.

`step` imagines: noise -> deep block (Jacobi) -> u -> shallow blocks inverse -> noisy latent x~. `observe` takes what
really happened: frames -> codec -> + noise -> x~. From x~ on both go the same way (`_commit`): shallow blocks forward
-> u, one causal pass of the deep block that writes exact K/V and yields the exact density of x~. Then the denoiser and
the codec make frames of an imagined one. The weights are `parts.WorldParts`, what a verb returns is in `chunk.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.chunk import Chunk, Likelihood, Score, actions_at
from worldmodel.codec.base import CodecState
from worldmodel.condition.spaces import pack_actions, prompt_key, prompts_of
from worldmodel.denoising import clean_frame
from worldmodel.errors import CheckpointError, InputError, WorldModelError
from worldmodel.flow.context import Context, appended
from worldmodel.flow.deep import Committed
from worldmodel.flow.native import density
from worldmodel.flow.window import make_room
from worldmodel.heads import Ahead, Outcome
from worldmodel.inputs import chunks_given, given_noise, given_pixels
from worldmodel.invariance import with_rows
from worldmodel.noise import OBSERVE, SAMPLE, SCORE, normal, seed_tensor
from worldmodel.parts import WorldParts
from worldmodel.prompted import conditions, continued, switched, with_unconditional
from worldmodel.records import replace
from worldmodel.sampling import Sampling
from worldmodel.starting import bank_actions, bank_chunks, bank_index, captioned, chunks_of
from worldmodel.state import WorldState


def _check_finite(what: str, *tensors: Tensor) -> None:
    """Raises WorldModelError where one has an element that is not finite."""
    if not all(math.isfinite(float(tensor.sum(dtype=torch.float64))) for tensor in tensors):
        raise WorldModelError(f"the model returned a {what} that is not finite; the state is unchanged")


class WorldModel(WorldParts):
    """A world: flow, codec, action encoder, heads, starts. Holds weights, no session; every method is pure."""

    # ---- sessions -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def initial_state(self, seeds: Sequence[int], prompts: Sequence[str] | None = None) -> WorldState:
        """Sessions with an empty past, one a seed; the first chunk is then unconditional on a past.

        ``prompts``: a caption for each, by default the empty (unconditional) one. Where the world's sampler has guidance,
        sessions keep a second past under the empty prompt from the start; else a guided step writes it.

        Raises:
            InputError: no seeds, prompts in a world that takes none, or not one for each seed.
        """
        drawn, config = seed_tensor(seeds), self.flow.config
        rows = len(drawn)
        captions, text, uncond = conditions(
            self.prompts, prompts, rows, self.spec.sampling.guidance > 0, self.device
        )
        reach = min(config.window, self.flow.denoiser_reach)
        tokens, dim = self.grid[0] * self.grid[1], config.token_dim
        codec = self.codec.initial_state(rows)
        zero = torch.zeros(rows, dtype=torch.int64)
        return WorldState(
            self.flow.deep.start(rows, self.grid, config.window, text, uncond, config.action_features),
            torch.zeros(rows, reach, tokens, dim, device=self.device),
            torch.zeros(rows, *self.latent_shape, device=self.device),
            codec,
            drawn,
            zero,
            zero.clone(),
            zero.clone(),
            torch.zeros(rows, dtype=torch.float64),
            captions,
            self._nothing_seen(rows),
        )

    def begin_clip(self, state: WorldState) -> WorldState:
        """The same sessions at the first frame of another clip: the flow's past stays, the codec begins anew.

        So a source clip comes before its target in video-to-video, as trained.
        """
        return replace(state, codec=self.codec.initial_state(state.rows))

    def prompt(self, state: WorldState, prompts: Sequence[str]) -> WorldState:
        """The same sessions under other captions, one for each; see `worldmodel.prompted.switched`.

        Raises:
            InputError: a world without prompts, or not one for each session.
        """
        if self.prompts is None:
            raise InputError("this world takes no prompts")
        return switched(self.flow, self.prompts, state, prompts)

    def adopt(self, state: WorldState) -> WorldState:
        """Sessions of the same weights under another sampler, as this world's own: with a past under the empty prompt where
        its sampler has guidance and without one where it has none, so that they can share a batch.
        """
        context, guided = state.context, self.spec.sampling.guidance > 0
        if self.prompts is None or guided == (context.uncond is not None):
            return state
        if guided:
            return replace(state, context=with_unconditional(self.flow, self.prompts, context))
        return replace(state, context=replace(context, uncond=None, uncond_text=None))

    def reset(
        self,
        seeds: Sequence[int],
        starts: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> tuple[WorldState, list[Chunk]]:
        """Sessions that begin with real clips from the world's own bank: the state, and the chunks observed.

        ``starts`` (B,) picks the clips; by default each session's seed does. ``prompts``: a caption for each, in place of
        the bank's.

        Raises:
            InputError: an index outside the bank.
        """
        index = bank_index(self.starts, seeds, starts)
        actions = self.with_prompts(self.start_actions(index), prompts)
        return self.observe_clip(self.initial_state(seeds, prompts), self.starts["frames"][index], actions)

    @property
    def start_chunks(self) -> int:
        """Chunks of a clip of the bank, 1 for a world without one."""
        return bank_chunks(self.starts, self.first_frames, self.chunk_frames)

    def start_actions(self, index: np.ndarray) -> Any:
        """Actions (B, T, ...) of clips of the bank, or None for a world without actions."""
        if self.actions is None and self.prompts is None:
            return None
        return bank_actions(self.starts, index)

    def with_prompts(self, actions: Any, prompts: Sequence[str] | None) -> Any:
        """Actions (B, T, ...) with the captions (B,) as their prompts; as they are where there are none."""
        return captioned(actions, prompt_key(self.spec.action_space), prompts)

    def chunks_of(self, clip: np.ndarray | Tensor) -> list[Any]:
        """A clip (B, n, height, width, 3) that a session begins with, cut into chunks.

        Raises:
            InputError: n is not ``first_frames + k F``.
        """
        return chunks_of(clip, self.first_frames, self.chunk_frames)

    def observe_clip(
        self, state: WorldState, frames: np.ndarray | Tensor, actions: Any
    ) -> tuple[WorldState, list[Chunk]]:
        """Observe several chunks: frames (B, T, F, height, width, 3) uint8, actions (B, T, ...) (dict of such) or None.

        Frames may also be a clip (B, n, height, width, 3) that the sessions begin with, see `chunks_of`.
        """
        parts = self.chunks_of(frames) if frames.ndim == 5 else [frames[:, t] for t in range(frames.shape[1])]
        chunks = []
        if actions is not None:
            chunks_given(actions, len(parts))
        for t, part in enumerate(parts):
            state, chunk = self.observe(state, part, actions_at(actions, t))
            chunks.append(chunk)
        return state, chunks

    # ---- the verbs ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(
        self,
        state: WorldState,
        action: Any = None,
        sampling: Sampling | None = None,
        noise: Tensor | None = None,
        decode: bool = True,
        action_gain: bool = True,
    ) -> tuple[WorldState, Chunk]:
        """Imagine the next chunk of every session.

        ``action``: (B, ...) in the world's action space, or None for no action (and the prompts that hold). A prompt that
        differs from a session's own takes its place from this chunk on, see `prompt`. ``noise``: (B, C, h, w) replaces the
        session's own random stream, e.g. with a chunk's inferred one for a counterfactual. ``decode=False`` leaves
        the pixels out, ``frames`` is then (B, 0, height, width, 3): for whoever plans on latents, rewards or nats. A
        codec that decodes in a stream cannot skip a chunk. ``action_gain=False`` leaves out the density without the action,
        up to half of the deep block's work; ``Chunk.action_gain`` is then NaN.

        Raises:
            InputError: wrong shape, dtype or range, or a second chunk in a world of pictures.
            WorldModelError: the model returned a value that is not finite.
        """
        sampling = sampling or self.spec.sampling
        if not decode and state.codec:
            raise InputError("this world's codec decodes in a stream: every chunk must be decoded")
        packed, features = self._action(action, state.rows)
        state = self._told(state, action, sampling.guidance)
        self.next_frames(state)
        drawn = self._noise(state, noise, SAMPLE)
        if noise is None:
            drawn = drawn * sampling.temperature
        w = self.flow.tokens(drawn[:, None])[:, 0]
        context = self._room(state, sampling)
        made = self.flow.imagine(
            context,
            w,
            features,
            sampling.guidance,
            sampling.tolerance,
            want_unconditional=features is not None and action_gain,
        )
        with self.flow.deep.given_back(made.reserved):
            after, likelihood = self._advance(
                state, context, made.context, made.x, made.u, made.log_det, made.terms, features
            )
            if not action_gain:
                likelihood = likelihood._replace(action_gain=torch.full_like(likelihood.log_prob, math.nan))
            clean, kept = clean_frame(self.flow, self.grid, after)
            latent = self.flow.latents(clean, self.grid)[:, 0]
            codec = state.codec
            frames = torch.empty(state.rows, 0, *self.spec.frame_size, 3, dtype=torch.uint8)
            if decode:
                frames, codec = self.codec.decode(latent[:, None], codec)
                if codec:  # a codec that remembers: its encoder has to see what was imagined
                    _, codec = self.codec.encode(frames, codec)
            seen, outcome = self._judged(state, latent, packed, frames)
            _check_finite("latent or reward", latent, outcome.reward, outcome.termination)
            chunk = Chunk(
                frames=frames,
                latent=latent,
                sweeps=made.sweeps,
                residual=made.residual,
                **outcome._asdict(),
                **likelihood.of_chunk(),
            )
            return replace(after, latent=latent, codec=codec, denoiser=kept, seen=seen), chunk

    @torch.no_grad()
    def observe(
        self,
        state: WorldState,
        frames: np.ndarray | Tensor,
        action: Any = None,
        sampling: Sampling | None = None,
    ) -> tuple[WorldState, Chunk]:
        """Advance every session by a real chunk: frames (B, F, height, width, 3) uint8, caused by ``action``.

        Leaves the state in the same form as `step` with this ``sampling`` (by default the world's own); the noise added to
        the latent is the session's own.

        Raises:
            InputError: wrong shape, dtype or range.
        """
        sampling = sampling or self.spec.sampling
        packed, features = self._action(action, state.rows)
        state = self._told(state, action, sampling.guidance)
        pixels, latent, codec = self._encode(state, frames)
        noise = self._noise(state, None, OBSERVE)
        x = self.flow.tokens((latent + self.flow.config.noise_std * noise)[:, None])
        context = self.flow.deep.reserve(self._room(state, sampling))
        with self.flow.deep.given_back(context):
            after, likelihood = self._commit(state, context, x, features, sampling.guidance)
            if codec:  # and its decoder what was observed
                _, codec = self.codec.decode(latent[:, None], codec)
            seen, outcome = self._judged(state, latent, packed, pixels)
            _check_finite("reward", outcome.reward, outcome.termination)
            chunk = Chunk(
                frames=pixels,
                latent=latent,
                sweeps=torch.zeros(state.rows, dtype=torch.int64),
                residual=torch.zeros(state.rows),
                **outcome._asdict(),
                **likelihood.of_chunk(),
            )
            return replace(after, latent=latent, codec=codec, denoiser=None, seen=seen), chunk

    @torch.no_grad()
    def score(
        self,
        state: WorldState,
        frames: np.ndarray | Tensor,
        action: Any = None,
        draws: int = 1,
        noise: Tensor | None = None,
        sampling: Sampling | None = None,
    ) -> Score:
        """How likely a real chunk is, without changing anything; see `Score`. Draw 0 is what `observe` would add.

        ``frames``, ``sampling`` as in `observe`; or the frames' latent (B, C, h, w) float32 as in `Chunk.latent`, which
        spares the codec.
        ``noise``: (B, C, h, w) is added, times the model's noise level, in place of the session's own; zero noise gives
        the density at the latent itself.

        Raises:
            InputError: wrong shape, dtype or range, draws < 1, or several draws of a given noise.
        """
        if draws < 1:
            raise InputError(f"draws is {draws}, expected at least 1")
        if noise is not None and draws > 1:
            raise InputError(f"one given noise for {draws} draws, expected 1 draw")
        sampling = sampling or self.spec.sampling
        packed, features = self._action(action, state.rows)
        state = self._told(state, action, sampling.guidance)
        if isinstance(frames, Tensor) and tuple(frames.shape) == (state.rows, *self.latent_shape):
            latent = frames.to(self.device, torch.float32)
        else:
            _, latent, _ = self._encode(state, frames)
        context = self._room(state, sampling, look_ahead=False)
        results = []
        for draw in range(draws):
            stream = OBSERVE if draw == 0 else SCORE
            drawn = self._noise(state, noise, stream, draw)
            x = self.flow.tokens((latent + self.flow.config.noise_std * drawn)[:, None])
            reserved = self.flow.deep.reserve(context)
            try:
                _, likelihood = self._commit(state, reserved, x, features, sampling.guidance)
            finally:
                self.flow.deep.release(reserved)
            results.append(likelihood)
        return Score.over(results)

    def infer_noise(
        self,
        state: WorldState,
        frames: np.ndarray | Tensor,
        action: Any = None,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """The noise (B, C, h, w) under which `step` from this state, with this ``sampling``, imagines this chunk's latent.

        Up to the solver's tolerance. It is that of the latent itself: what `observe` adds is no part of what happened.
        """
        silent = torch.zeros(state.rows, *self.latent_shape)
        return self.score(state, frames, action, noise=silent, sampling=sampling).noise

    def rollout(
        self,
        state: WorldState,
        actions: Any,
        sampling: Sampling | None = None,
        decode: bool = True,
        action_gain: bool = True,
    ) -> tuple[WorldState, list[Chunk]]:
        """Imagine T chunks: ``actions`` (B, T, ...), or a dict of such arrays. ``decode``, ``action_gain``: see `step`.

        Raises:
            InputError, WorldModelError: as `step`.
        """
        horizon = chunks_given(actions)
        chunks = []
        for t in range(horizon):
            state, chunk = self.step(
                state, actions_at(actions, t), sampling, decode=decode, action_gain=action_gain
            )
            chunks.append(chunk)
        return state, chunks

    @torch.no_grad()
    def ahead(self, state: WorldState) -> Ahead:
        """Value and prior of what may come next in the sessions; see `worldmodel.heads.Ahead`.

        Raises:
            InputError: the world's heads foresee neither.
        """
        if self.heads is None:
            raise InputError(f"world {self.spec.name} has no heads; train it with some")
        return self.heads.ahead(state.latent if state.seen is None else state.seen)

    def save_state(self, state: WorldState, path: str | Path) -> None:
        """Write a state to one file, atomically; see `WorldState.save`."""
        state.save(path, self.fingerprint)

    def load_state(self, path: str | Path) -> WorldState:
        """Read a state that this world saved; see `WorldState.load`.

        Raises:
            CheckpointError: corrupt, or of another world, also where only its configuration differs.
        """
        state = WorldState.load(path, self.fingerprint, self.device)
        if misfits := self.misfits(state):
            raise CheckpointError(f"{path}: does not fit this world's configuration ({', '.join(misfits)})")
        return self.adopt(state)

    def misfits(self, state: WorldState) -> list[str]:
        """What of a state this world cannot go on from, as where frames are of another size or a file was tampered with."""
        found, expected = state.kinds(), self.initial_state([0]).kinds()
        expected.pop("uncond_text", None)  # sessions may do without
        wrong = [name for name, kind in expected.items() if found.get(name) != kind]
        return wrong + ["grid"] * (state.context.grid != self.grid)

    # ---- parts ----------------------------------------------------------------------------------------------------------
    def _action(self, action: Any, rows: int) -> tuple[Tensor, Tensor | None]:
        """Packed actions (B, P) and their features (B, 1, E)."""
        if self.actions is None and self.prompts is None and action is not None:
            raise InputError("this world takes no actions; pass action=None")
        if action is None:
            size = 0 if self.actions is None else self.actions.config.packed
            return torch.zeros(rows, size, device=self.device), None
        packed = torch.from_numpy(pack_actions(self.spec.action_space, action, rows)).to(self.device)
        if self.actions is None:
            return packed, None
        return packed, with_rows(self.actions.layers.least_rows, self.actions, packed)[:, None]

    def _noise(self, state: WorldState, given: Tensor | None, stream: int, draw: int = 0) -> Tensor:
        """Noise (B, C, h, w) where the weights are: what was given, or the sessions' own."""
        if given is not None:
            return given_noise(given, (state.rows, *self.latent_shape), self.device)
        return normal(state.seeds, state.branches, state.steps, stream, self.latent_shape, draw).to(
            self.device
        )

    def _encode(self, state: WorldState, frames: np.ndarray | Tensor) -> tuple[Tensor, Tensor, CodecState]:
        shape = (state.rows, self.next_frames(state), *self.spec.frame_size, 3)
        pixels = given_pixels(frames, shape)
        latents, codec = self.codec.encode(pixels.to(self.device), state.codec)
        return pixels, latents[:, 0], codec

    def _nothing_seen(self, rows: int) -> Tensor | None:
        """What an eye has seen before the first chunk (B, X)."""
        if self.heads is None or self.heads.eye is None:
            return None
        return torch.zeros(rows, self.heads.config.seen, device=self.device)

    def _judged(
        self, before: WorldState, latent: Tensor, packed: Tensor, frames: Tensor
    ) -> tuple[Tensor | None, Outcome]:
        """What the heads have seen after a chunk with this clean latent, its reward and termination; zeros without heads.

        ``before``: a state with what they had seen before it, and the latent before it.
        """
        if self.heads is None:
            return before.seen, Outcome(torch.zeros(before.rows), torch.zeros(before.rows))
        seen = self.heads.see(before.seen, latent, frames, packed, self.codec)
        outcome: Outcome = self.heads(before.latent, latent if seen is None else seen, packed)
        return seen, outcome

    def _told(self, state: WorldState, action: Any, guidance: float) -> WorldState:
        """The sessions under the prompts of ``action``, and with a past under the empty one where guidance asks for it."""
        captions = prompts_of(self.spec.action_space, action, state.rows)
        if self.prompts is None:
            return state
        state = state if captions is None else self.prompt(state, captions)
        if guidance == 0:
            return state
        return replace(state, context=with_unconditional(self.flow, self.prompts, state.context))

    def _room(self, state: WorldState, sampling: Sampling, look_ahead: bool = True) -> Context:
        if not self.spec.fps and bool(state.steps.any()):
            raise InputError(
                f"{self.spec.name} makes pictures: nothing comes after one; begin another session for another picture"
            )
        keep = self.flow.config.context if sampling.context == "reencode" else None
        context = state.context if self.prompts is None else continued(self.prompts, state)
        return make_room(self.flow.deep, context, keep, look_ahead)

    def _commit(
        self, state: WorldState, context: Context, x: Tensor, features: Tensor | None, guidance: float
    ) -> tuple[WorldState, Likelihood]:
        """Real noisy tokens x (B, 1, N, D) to the next state and exact terms; ``context`` is reserved."""
        u, log_det = self.flow.shallow_forward(x, self.grid)
        told = features is not None or context.uncond is not None
        after, terms = self.flow.deep.commit(
            context, u, features, guidance if told else 0.0, features is not None
        )
        return self._advance(state, context, after, x, u, log_det, terms, features)

    def _advance(
        self,
        state: WorldState,
        context: Context,
        after: Context,
        x: Tensor,
        u: Tensor,
        log_det: Tensor,
        terms: Committed,
        features: Tensor | None,
    ) -> tuple[WorldState, Likelihood]:
        """The next state, but for what comes of the clean frame, and the exact density of a committed frame, imagined or
        real; ``context`` is the one before.
        """
        z, elements, nats = density(u, terms.maps, log_det)
        log_prob = nats[0]
        _check_finite("likelihood", log_prob)
        noise = model_noise = self.flow.latents(z, self.grid)[:, 0]
        if terms.guided is not None:
            noise = self.flow.latents(terms.guided.forward(u), self.grid)[:, 0]
        unconditional = nats[1] if len(nats) > 1 else None
        likelihood = Likelihood(
            log_prob,
            nats[2] if len(nats) > 2 else None,
            torch.zeros_like(log_prob)
            if unconditional is None or (features is None and context.uncond is None)
            else log_prob - unconditional,
            self.flow.latents(elements, self.grid)[:, 0].sum(1),
            noise,
            torch.from_numpy(np.array(context.frames)),
            model_noise,
        )
        history = appended(state.noisy, x)
        state = replace(
            state, context=after, noisy=history, steps=state.steps + 1, log_prob=state.log_prob + log_prob
        )
        return state, likelihood
