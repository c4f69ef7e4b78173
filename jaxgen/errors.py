"""Exceptions shared by several parts of the package. Bad arguments raise plain `ValueError` / `TypeError`."""

from __future__ import annotations


class RequestError(RuntimeError):
    """A request ended for a reason other than its arguments (queue full, time-out, memory, internal error).

    `status_code` means what it means in HTTP, whether or not HTTP is used; `detail` is the reason in words.
    """

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(f"{detail} (status {status_code})")
        self.status_code = status_code
        self.detail = detail

    def __reduce__(self) -> tuple[type[RequestError], tuple[int, str]]:
        return type(self), (self.status_code, self.detail)


class EngineDeadError(RuntimeError):
    """The engine has been shut down or its thread has died; the cause is chained with `raise ... from`."""


class ModelLoadError(RuntimeError):
    """Weights, tokenizer or configuration could not be loaded."""
