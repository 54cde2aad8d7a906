"""Errors for users. Code decides by ``code``; the message is for people and may change at any time."""

from __future__ import annotations

from typing import Literal, get_args

UserErrorCode = Literal[
    "invalid_input",
    "image_missing",
    "image_empty",
    "image_unreadable",
    "image_too_large",
    "image_bad_shape",
    "dicom_unreadable",
    "dicom_unsupported",
    "dicom_without_image",
    "dicom_without_decoder",
    "image_decode_failed",
    "image_decode_timeout",
    "image_decoder_down",
    "conversation_order",
    "prompt_format",
    "address_invalid",
    "server_refused",
    "server_unreachable",
    "part_stopped",
]
"""The closed set of codes of ``UserError``. ``invalid_input`` covers files, settings and arguments.

The other codes exist because some caller treats the case differently.
"""

USER_ERROR_CODES: tuple[UserErrorCode, ...] = get_args(UserErrorCode)

DEFAULT_EXIT_STATUS = 2

_EXIT_STATUS: dict[UserErrorCode, int] = {"server_unreachable": 3, "server_refused": 3, "part_stopped": 4}


class UserError(ValueError):
    """A mistake that the user can fix. The message names the file or key, the value and the fix.

    The command line prints it as one paragraph without a stack trace and exits with ``exit_status``.

    Args:
        code: the kind of mistake; see ``UserErrorCode``.
    """

    def __init__(self, message: str, *, code: UserErrorCode = "invalid_input") -> None:
        super().__init__(message)
        assert code in USER_ERROR_CODES, code
        self.code: UserErrorCode = code

    @property
    def exit_status(self) -> int:
        """2 for bad input, 3 if a server failed or refused, 4 if a part of ``serve`` stopped."""
        return _EXIT_STATUS.get(self.code, DEFAULT_EXIT_STATUS)
