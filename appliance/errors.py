"""The error tree. Every error that leaves a module is one of these; foreign exceptions end in their home package.

An error is a message (what happened, got/expected) plus a hint (what to do next). `code` names the error in logs,
problem documents and docs; `exit_code` is what the command line returns; `retryable` tells a driver whether trying
the same thing again can help. The one boundary that turns errors into exit codes is `appliance.cli`.
"""

from __future__ import annotations

from typing import ClassVar


class ApplianceError(Exception):
    """Root of all errors of this program."""

    code: str = "APPLIANCE-000"
    exit_code: ClassVar[int] = 1
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", code: str = "", retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code:
            self.code = code
        if retryable is not None:
            self.retryable = retryable


class UsageError(ApplianceError):
    """The caller asked for something that makes no sense here."""

    code = "USAGE-001"
    exit_code = 2


class SettingsError(ApplianceError):
    """The settings file, environment or flags don't hold."""

    code = "SETTINGS-001"
    exit_code = 3


class StorageError(ApplianceError):
    """A file could not be written or read safely."""

    code = "STORAGE-001"
    exit_code = 4


class DocumentBrokenError(StorageError):
    """A state file was truncated, changed or of an unknown version; it was set aside."""

    code = "STORAGE-002"


class DowngradeError(StorageError):
    """The state was written by a newer version of this program."""

    code = "STORAGE-003"


class LockedError(StorageError):
    """Another daemon works on the same root."""

    code = "STORAGE-004"


class StoreError(StorageError):
    """The controller's store refused or failed an operation."""

    code = "STORE-001"


class UnreachableError(ApplianceError):
    """The other side (daemon, controller, SE) did not answer."""

    code = "REACH-001"
    exit_code = 5
    retryable = True


class TrustError(ApplianceError):
    """Something did not prove what it claims to be."""

    code = "TRUST-001"
    exit_code = 6


class PassphraseError(TrustError):
    """The root key is locked, and its passphrase is needed."""

    code = "TRUST-010"


class WrongPassphraseError(PassphraseError):
    """A passphrase doesn't open the root key."""

    code = "TRUST-011"


class TooSoonError(PassphraseError):
    """Wrong passphrases came before this one: it is not looked at yet."""

    code = "TRUST-012"
    retryable = True


class SeedError(ApplianceError):
    """The seed is missing, incomplete or not of this cluster."""

    code = "SEED-001"
    exit_code = 6


class ImageError(ApplianceError):
    """An image, or the disk it starts from, can't be made or isn't what it should be."""

    code = "IMAGE-001"
    exit_code = 11


class EnrollError(ApplianceError):
    """Enrollment was refused or could not be carried out."""

    code = "ENROLL-000"
    exit_code = 7


class TunnelError(ApplianceError):
    """A link could not be made or was lost."""

    code = "TUNNEL-000"
    exit_code = 7
    retryable = True


class TelemetryError(ApplianceError):
    """A sample of host figures is not what the stage telemetry says."""

    code = "TELEMETRY-000"


class ModeError(ApplianceError):
    """The machine's mode can't be changed as asked."""

    code = "MODE-001"
    exit_code = 8


class ChildError(ApplianceError):
    """A program we ran failed; the message carries the command to paste."""

    code = "CHILD-001"
    exit_code = 9


class NotFoundError(ApplianceError):
    """The named thing isn't known."""

    code = "NOTFOUND-001"
    exit_code = 10


class StateMachineError(ApplianceError):
    """An event that the current state doesn't allow: a defect of ours."""

    code = "STATE-001"
    exit_code = 70
