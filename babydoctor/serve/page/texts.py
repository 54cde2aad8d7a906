"""Every sentence that the web UI shows: notices, questions to begin with, and one sentence for each error code.

Error sentences are chosen by the error's code. The text that a server or a library wrote is never shown: it may quote
a file, and it is written for programmers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babydoctor.serve.api.errors import OVERFLOW

RESEARCH_NOTICE = (
    "Research use only. BabyDoctor is not a medical device. It makes mistakes that sound certain; never use its "
    "answers for diagnosis, treatment or any other decision about a patient."
)

NOT_CLINICAL = "RESEARCH ONLY - NOT FOR CLINICAL USE."

CONNECTION = {
    "lost": (
        "The connection to the server is lost. What you type stays here; send a question again when the connection is "
        "back."
    ),
    "back": "The connection to the server was lost for a while and is back. What you typed is still here.",
    "failed": "The server failed at this. Please try again; if it fails again, tell the person who runs it.",
}
"""Shown by ``connection.js``."""

GATE_TEXT = """
## Before you begin

BabyDoctor is a **research prototype** of a radiology vision-language model, trained on a small scale.

- It is **not a medical device** and has not been validated for any clinical task. Its answers are often wrong, and
  they sound just as certain when they are.
- **Never use an answer** for diagnosis, treatment, triage or any other decision about a patient.
- Load only images that you **may use for research**, without names or other identifying data. Header tags of DICOM
  files are not shown and not sent to the model, but text that is burned into the pixels is part of the image.
- Images and conversations are kept **in memory only**. They are deleted {keep_min} minutes after you close this tab;
  until then a reload brings them back. Feedback is saved only when you allow it.
"""

QUESTIONS = (
    "What kind of scan is this?",
    "What is the main finding?",
    "On which side of the patient is the finding?",
    "Describe the image.",
)

CHAT_PLACEHOLDER = "Load an image, then ask about it."

BURNED_IN_NOTE = (
    "Text burned into the pixels (names, dates) cannot be ruled out automatically. Look at the image before you ask."
)
BURNED_IN_WARNING = (
    "The file says that text is burned into its pixels. It may name a person, and the model would get it. "
    "Do not ask about this image unless it is anonymous."
)

BURNED_IN_SEARCHED = (
    "Text burned into the pixels is looked for automatically, and some of it may be missed. Look at the image before "
    "you ask."
)
TEXT_KINDS = {"name": "may be a name", "date": "date, time or age", "number": "number", "unclear": "unclear text"}
"""What is said of each kind of identifying text. The text itself is not repeated."""
TEXT_SEARCH_FAILED = (
    "The search for text in the picture failed, so text burned into the pixels was not found. Look at the image before "
    "you ask."
)
NO_TEXT_FOUND = "No text that may identify a person was found in the picture."

OVERLAY_NOTE = (
    "Color shows which parts of the image the answer depended on: each part was hidden in turn, and the answer became "
    "less likely by that much, scaled to the largest drop. It does **not** show that the answer is right: a wrong "
    "answer can depend on the right place, and a right one on another. It is coarse and does not outline a finding."
)

REPORT_NOTE = (
    "A draft for research, **not for clinical use**: check every word. Your browser saves the file; the server keeps "
    "none. A DICOM SR needs a DICOM image and carries that file's patient attributes."
)

LOCALIZATION = (
    "On phantoms, the peak of such a map lies on the finding, or within half a patch of it, in {hits} of {cases} "
    "cases. Not measured on real images."
)
NO_LOCALIZATION = "Whether such maps point at the finding has not been measured for this model."


def localization_note(figure: Mapping[str, Any] | None) -> str:
    """How far an overlay can be trusted: the figure that the run's manifest carries, if it does."""
    try:
        return LOCALIZATION.format(hits=int(figure["num_near"]), cases=int(figure["num_cases"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return NO_LOCALIZATION


ENDINGS = {
    "stopped": "Stopped by you.",
    "length": "Cut off at the set length. Raise “Longest answer” under Settings for more.",
    "error": "This answer broke off.",
}
"""Shown under an answer that did not end by itself, by ``Exchange.ended``."""

_TOO_LONG = "The conversation is too long for the model. Press “Clear chat” and ask again."
_TOO_LARGE = (
    "The image is too large for the server. Export it smaller, for example as a PNG of 2000 pixels, and load it."
)
_LOST = (
    "The model stopped before the answer was complete. Words that had already arrived are kept. "
    "Please ask again; if it happens again, tell the person who runs this server."
)
_NO_MODEL_RUNS = "No model is running at the moment. Please try again soon, or tell the person who runs this server."
_SET_UP = "The server with the models is not set up correctly. Tell the person who runs it."
_GENERAL = "The server could not answer this request. Please try again; if it fails again, tell the person who runs it."

SENTENCES: dict[str, str] = {
    # Codes of the controller and its workers, see serve/api/errors.py.
    "queue_full": "The model is busy with other people's questions. Please try again{when}.",
    "draining": "The server is about to restart. Please try again in a minute.",
    "no_worker": _NO_MODEL_RUNS,
    "not_ready": _NO_MODEL_RUNS,
    "model_not_found": "The chosen model is not running any more. Please choose another one from the list above.",
    "worker_lost": _LOST,
    "worker_unreachable": _LOST,
    "upstream_lost": _LOST,
    "upstream_refused": "The model refused this question. Please word it differently, or ask for a shorter answer.",
    "upstream_key": _SET_UP,
    "worker_refused": _SET_UP,
    "worker_failed": "The model failed at this question. Your image is fine; please ask again or word it differently.",
    "internal": "The server failed at this question. Please ask again; if it fails again, tell the person who runs it.",
    "image_too_large": _TOO_LARGE,
    "body_too_large": _TOO_LARGE,
    "image_decode_failed": "The server could not read this image: its decoder failed. Please export it again.",
    "image_decode_timeout": "The image takes too long to read; it may be damaged. Please export it again.",
    "bad_image": "The server could not read this image. Please load it again.",
    "prompt_too_long": _TOO_LONG,
    OVERFLOW: _TOO_LONG,
    "deadline": "The answer took longer than this server allows and was stopped. Please ask for a shorter answer.",
    "bad_key": "The web UI may not use the server: its access key is wrong. Tell the person who runs it.",
    "unsupported": "This model cannot show where it looked.",
    # Codes of the web UI itself.
    "no_controller": "The server with the models cannot be reached. Tell the person who runs it.",
    "silent": "The server has stopped answering. Please try again soon.",
    "no_model": "No model is chosen. Please choose one from the list above; if it is empty, no model is running.",
    "no_image": "There is no image yet. Please load one or choose an example, then ask.",
    "no_question": "Please write a question first.",
    "image_in_question": "The question holds the text “<image>”, which the model uses as a mark. Please leave it out.",
    "no_answer": "There is no answer yet. Ask a question first.",
    "cannot_sample": "The model's server cannot ask the question several times. Nothing was compared.",
    "still_answering": "The model is still answering. Wait for the end, or press “Stop” first.",
    "session_lost": "The server was restarted and has lost your image and conversation. Please reload this tab.",
    "session_gone": "The server no longer has the image and the conversation of this tab. Please load the image again.",
    "upload_too_large": "The file is larger than the limit of {limit_mb} MB. Export a single image of it.",
    "uploads_busy": "Others are loading large files at the moment. Please try again in a minute.",
    "upload_broken": "The file did not arrive whole. Please check the connection and try again.",
    "bad_event": "This tab sent something that the server does not know. Please reload the tab.",
    "upload_gone": "The file was not fetched in time. Please load it again.",
    "empty_file": "The file is empty (0 bytes). Please export it again.",
    "not_an_image": "This file is neither an image (PNG, JPEG, TIFF, WebP, BMP, GIF) nor a readable DICOM file.",
    "bad_dicom": "This is a DICOM file, but its image cannot be read: it is damaged or of an unusual kind.",
    "dicom_without_image": "This DICOM file holds no image: it may be a report, a plan or a DICOMDIR.",
    "dicom_unsupported": "This DICOM file cannot be shown: {detail}. Export it uncompressed or as a PNG.",
    "dicom_without_decoder": "This server cannot read the compression of this DICOM file. Export it uncompressed.",
    "damaged_image": "The image file is damaged or cut off. Please export it again.",
    "too_many_pixels": "The image has too many pixels. Please load a smaller version of it.",
    "odd_shape": "The image is a very thin strip, which the model cannot use. Please load another one.",
    # Codes of a study.
    "study_too_large": "These files hold more than 512 MB together. Load one series at a time.",
    "study_too_many": "These are more than 5000 files. Load one series at a time.",
    "study_empty": "None of these files is an image that can be read here.",
    "study_gone": "The images were not fetched in time. Please load them again.",
    "directory_alone": "A DICOMDIR only lists other files. Load the folder that it lies in.",
    "zip_damaged": "The ZIP archive is damaged or of an unusual kind. Please pack it again.",
    "zip_bomb": "The ZIP archive would unpack to far more than images need. Please load the files themselves.",
    "bad_window": "Level and width may be up to 1,000,000, and the width must be at least 1. Nothing was changed.",
    "second_tab": "This tab is a copy of another one, so its conversation begins anew. The other tab keeps its own.",
    "map_canceled": "Canceled. The model has stopped computing where it looked.",
    "map_lost": "The model stopped while it computed where it looked. Please try again.",
    "map_left": "Computing where it looked was stopped because this tab was closed, reloaded or lost its connection.",
    "empty_report": "The report draft is empty. Write something, or take the answers into it.",
    "report_needs_dicom": "The image is not a DICOM file, so no DICOM report can refer to it. Save text or HTML.",
    "no_dicom_writer": "This server cannot write DICOM reports: the extra “pacs” is not installed. Save text or HTML.",
    # Codes of the PACS.
    "pacs_no_query": "Please enter a patient ID, an accession number or a study date.",
    "pacs_date": "Please write the study date like 2024-05-31, or two dates with “to” between them.",
    "pacs_wildcard": "Please enter whole numbers: *, ? and \\ are not allowed.",
    "pacs_unreachable": "The PACS cannot be reached. Please try again, or tell the person who runs this server.",
    "pacs_credentials": "The PACS refuses this server’s credentials. Tell the person who runs this server.",
    "pacs_refused": "The PACS has refused this. Tell the person who runs this server.",
    "pacs_not_dicomweb": "The PACS gave an answer that is not DICOMweb. Tell the person who runs this server.",
    "pacs_no_images": "This series holds no images.",
    "pacs_not_from_here": "The image did not come from a PACS, so there is nowhere to store the answer.",
    "pacs_read_only": "This PACS is set up for reading only. Nothing was stored.",
    "pacs_no_report": "Nothing was stored: the image lacks attributes that a report needs.",
    "odd_region": "The region is too small or too thin for the model. Draw a larger box. Nothing was changed.",
    "no_consent": "Nothing was saved: tick the box that allows it first.",
    "no_verdict": "Nothing was saved: choose whether the answer was good, or write a comment.",
    "feedback_full": "The feedback could not be saved: the server's file is full. Tell the person who runs it.",
    "not_saved": "The feedback could not be saved on the server. Tell the person who runs it.",
}


def model_gone(model: str) -> str:
    """Said while the chosen model is not running."""
    return (
        f"The model “{model}” is not running any more. It stays chosen, and no other model answers in its place. "
        "Wait for it to come back, or choose another one."
    )


def model_back(model: str) -> str:
    """Said once, when the chosen model runs again."""
    return f"The model “{model}” is running again."


class PageError(Exception):
    """A problem that the web UI tells its user.

    Args:
        code: a key of ``SENTENCES``. A code that is not there gets a general sentence.
        retry_after_s: seconds after which the server wants to be asked again.
        limit_mb: the upload limit in MB.
        detail: why a file is not supported, without any text of the file.
    """

    def __init__(
        self, code: str, *, retry_after_s: float | None = None, limit_mb: int | None = None, detail: str = ""
    ) -> None:
        super().__init__(code)
        self.code = code
        self.retry_after_s = retry_after_s
        when = "in a few moments" if not retry_after_s else f"in about {retry_after_s:.0f} seconds"
        self.sentence = SENTENCES.get(code, _GENERAL).format(when=f" {when}", limit_mb=limit_mb, detail=detail)
