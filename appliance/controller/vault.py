"""The passphrase of the root key: set, changed, removed; the issuing CA renewed; the root opened for one act.

Nothing here is remembered between two acts: a passphrase comes with a request, opens the roots for what that request
asks for, and is forgotten. All of it is prepared first, and put in place by one switch of files (`switching`), so a
power cut leaves the state before or after it, and no start ever needs the passphrase.

A guess costs half a second and 128 MiB; one is tried at a time, and after a wrong one the next has to wait, longer
each time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from appliance.controller.material import Files, Material, issue_node_certificate, write_pair
from appliance.controller.rotation import NextRoot
from appliance.controller.switching import staged, switch
from appliance.controller.trust import Publication
from appliance.errors import TooSoonError, UsageError, WrongPassphraseError
from appliance.pki import sealed
from appliance.pki.authority import Authority
from appliance.pki.secret import Secret
from appliance.storage.atomic import write_atomic

Prepare = Callable[[Secret | None], NextRoot]

MIN_WAIT_S = 1.0
MAX_WAIT_S = 60.0


class Vault:
    """Acts that need the root. One loop only.

    Args:
        material: changed in place.
        publication: of the trust document.
        on_switch: called when the node certificate was issued anew, so that live listeners show it.
        wall: seconds since 1970.
        monotonic: seconds, for the wait after a wrong passphrase.
    """

    def __init__(
        self,
        material: Material,
        publication: Publication,
        *,
        on_switch: Callable[[], None],
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._material = material
        self._publication = publication
        self._on_switch = on_switch
        self._wall = wall
        self._monotonic = monotonic
        self._turn = asyncio.Lock()
        self._wrong = 0
        self._not_before = 0.0

    @property
    def wait_s(self) -> float:
        """How long until a passphrase is looked at again; 0 or less where one is at once."""
        return self._not_before - self._monotonic()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """For whoever changes files of the roots: one at a time."""
        async with self._turn:
            yield

    @contextlib.asynccontextmanager
    async def opened(self, passphrase: Secret | None, prepare: Prepare | None = None) -> AsyncIterator[NextRoot | None]:
        """Has the roots open within it, in a turn of its own. There must be no `await` within.

        A passphrase that isn't needed is not looked at; a missing one is found by what needs it.

        Args:
            passphrase: of the root key.
            prepare: makes what is given to the body, in a thread; called with the passphrase once that was right, or
                with None where none is needed.

        Raises:
            PassphraseError: the wrong passphrase, or one too soon after a wrong one.
        """
        async with self._turn:
            if passphrase is None or not self._material.authority.is_locked:
                is_free = prepare is not None and not self._material.authority.is_locked
                yield await asyncio.to_thread(prepare, None) if prepare is not None and is_free else None
                return
            if self.wait_s > 0:
                raise TooSoonError(
                    f"a wrong passphrase came before: the next one is looked at in {self.wait_s:.0f} s",
                    hint="wait, then give the right one",
                )
            try:
                keys = await asyncio.to_thread(self._material.unlock, passphrase)
            except WrongPassphraseError:
                self._wrong += 1
                self._not_before = self._monotonic() + min(MAX_WAIT_S, MIN_WAIT_S * 2 ** (self._wrong - 1))
                raise
            self._wrong = 0
            made = await asyncio.to_thread(prepare, passphrase) if prepare is not None else None
            with self._material.unlocked(keys):
                yield made

    async def set(self, new: Secret) -> None:
        """Puts the root key under a passphrase, and makes the issuing CA.

        Raises:
            UsageError: there is one already, or the new one protects nothing.
        """
        sealed.check_passphrase(new)
        async with self._turn:
            if self._material.authority.is_locked:
                raise UsageError("the root key has a passphrase already", hint="`passphrase change` changes it")
            opened = [entry for entry in self._roots() if entry is not None]
            texts = await asyncio.to_thread(_key_files, opened, new)
            self._stage_keys(texts)
            self._stage_issuing()
            self._switch(self._key_places(), self._issuing_places())

    async def change(self, old: Secret, new: Secret) -> None:
        """Puts the root key under another passphrase.

        Raises:
            UsageError: there is none, or the new one protects nothing.
            PassphraseError: the old one is wrong.
        """
        sealed.check_passphrase(new)
        self._check_locked()
        async with self.opened(old):
            opened = [entry for entry in self._roots() if entry is not None]
        texts = await asyncio.to_thread(_key_files, opened, new)
        async with self._turn:
            self._check_same(opened)
            self._stage_keys(texts)
            switch(self._files.state, self._key_places())
            self._material.load_authorities()

    async def remove(self, passphrase: Secret) -> None:
        """Leaves the root key without a passphrase, and destroys the issuing CA's key.

        Raises:
            UsageError: there is none.
            PassphraseError: the passphrase is wrong.
        """
        self._check_locked()
        async with self.opened(passphrase):
            self._stage_keys([entry.key_file() for entry in self._roots() if entry is not None])
            gone = [path for _, path in self._issuing_places()]
            switch(self._files.state, self._key_places(), gone=gone)
            self._follow()

    async def renew_issuing(self, passphrase: Secret, *, revoke: bool) -> None:
        """Replaces the issuing CA; with `revoke`, SEs refuse what the present one signed.

        Raises:
            UsageError: there is no issuing CA, or the trust document has no room for another revoked key.
            PassphraseError: the passphrase is wrong.
        """
        self._check_locked()
        async with self.opened(passphrase):
            material, moves = self._material, self._issuing_places()
            if revoke and material.issuing is not None:
                revoked = [*material.trust.revoked_node_keys, material.issuing.key_id]
                self._publication.stage(revoked_node_keys=revoked)
                moves.append((staged(self._files.trust), self._files.trust))
            self._stage_issuing()
            self._switch(moves)
            if revoke:
                self._publication.reload()

    @property
    def _files(self) -> Files:
        return self._material.files

    def _check_locked(self) -> None:
        if not self._material.authority.is_locked:
            raise UsageError(
                "the root key has no passphrase", hint="`appliance controller passphrase set` gives it one"
            )

    def _check_same(self, roots: list[Authority]) -> None:
        """Between opening and switching somebody else had a turn: what was prepared must be for the roots of now."""
        now = [entry.fingerprint for entry in self._roots() if entry is not None]
        if now != [entry.fingerprint for entry in roots]:
            raise UsageError("the root CA was changed meanwhile", hint="nothing was done; try again")

    def _roots(self) -> tuple[Authority | None, Authority | None, Authority | None]:
        material = self._material
        return material.authority, material.former, material.successor

    def _key_places(self) -> list[tuple[Path, Path]]:
        path = self._files.root_key
        places = (path, self._files.former(path), self._files.successor(path))
        return [(staged(place), place) for place, root in zip(places, self._roots(), strict=True) if root is not None]

    def _stage_keys(self, texts: list[Secret]) -> None:
        for (place, _), text in zip(self._key_places(), texts, strict=True):
            write_atomic(place, text.reveal(), mode=0o600)

    def _issuing_places(self) -> list[tuple[Path, Path]]:
        return [(staged(path), path) for path in (self._files.issuing_certificate, self._files.issuing_key)]

    def _stage_issuing(self) -> None:
        certificate, key = (place for place, _ in self._issuing_places())
        write_pair(self._material.authority.issue_issuing(now=int(self._wall())), certificate, key)

    def _switch(self, *moves: list[tuple[Path, Path]]) -> None:
        switch(self._files.state, [move for some in moves for move in some])
        self._follow()

    def _follow(self) -> None:
        """The files are in place: the daemon and its listener follow."""
        material = self._material
        material.load_authorities()
        issue_node_certificate(material.issuer, material.files, material.cluster, now=int(self._wall()))
        self._on_switch()


def _key_files(roots: list[Authority], passphrase: Secret) -> list[Secret]:
    """What the roots' key files hold under a passphrase; half a second and 128 MiB each: for a thread."""
    return [root.key_file(passphrase) for root in roots]
