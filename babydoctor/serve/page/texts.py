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
    "failed": "Something went wrong on the server. Please try again; if it happens again, tell the person who runs it.",
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
    "This server does not search images for burned-in text such as names or dates. Check the image before you ask."
)
BURNED_IN_WARNING = (
    "The file says that text is burned into its pixels. That text may identify a person and would be sent to the "
    "model. Do not ask about this image unless it is anonymous."
)

BURNED_IN_SEARCHED = (
    "The image is searched for burned-in text automatically, but some of it may be missed. Check the image before you "
    "ask."
)
TEXT_KINDS = {"name": "may be a name", "date": "date, time or age", "number": "number", "unclear": "unclear text"}
"""What is said of each kind of identifying text. The text itself is not repeated."""
TEXT_SEARCH_FAILED = "The search for burned-in text failed, so no text is hidden. Check the image before you ask."
NO_TEXT_FOUND = "No text that may identify a person was found in the image."

OVERLAY_NOTE = (
    "Each part of the image was hidden in turn. The stronger the color, the less likely the answer became. This does "
    "**not** show that the answer is right: a wrong answer can depend on the right place, and a right answer on the "
    "wrong place. The map is coarse and does not outline a finding."
)

REPORT_NOTE = (
    "A draft for research, **not for clinical use**: check every word. Your browser saves the file; the server keeps "
    "no copy. A DICOM SR needs a DICOM image and contains the patient data of that image's file."
)

LOCALIZATION = (
    "On phantoms, the peak of this map was on the finding or right beside it in {hits} of {cases} cases. Not measured "
    "on real images."
)
NO_LOCALIZATION = "How often such maps point at the finding has not been measured for this model."


def localization_note(figure: Mapping[str, Any] | None) -> str:
    """How far an overlay can be trusted: the figure that the run's manifest carries, if it does."""
    try:
        return LOCALIZATION.format(hits=int(figure["num_near"]), cases=int(figure["num_cases"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return NO_LOCALIZATION


ENDINGS = {
    "stopped": "Stopped by you.",
    "length": "Cut off at the length limit. Raise “Longest answer” under Settings to get more.",
    "error": "This answer was interrupted.",
}
"""Shown under an answer that did not end by itself, by ``Exchange.ended``."""

_TOO_LONG = "The conversation is too long for the model. Press “Clear chat” and ask again."
_TOO_LARGE = (
    "The image is too large for the server. Export a smaller one, for example a PNG 2000 pixels wide, and load that."
)
_LOST = (
    "The model stopped before the answer was complete. Words that had already arrived are kept. "
    "Please ask again; if it happens again, tell the person who runs this server."
)
_NO_MODEL_RUNS = "No model is running at the moment. Please try again soon, or tell the person who runs this server."
_SET_UP = "The model server is not set up correctly. Tell the person who runs it."
_GENERAL = "The server could not answer this request. Please try again; if it fails again, tell the person who runs it."

SENTENCES: dict[str, str] = {
    # Codes of the controller and its workers, see serve/api/errors.py.
    "queue_full": "The model is busy with other people's questions. Please try again{when}.",
    "draining": "The server is about to restart. Please try again in a minute.",
    "no_worker": _NO_MODEL_RUNS,
    "not_ready": _NO_MODEL_RUNS,
    "model_not_found": "The chosen model is no longer running. Please choose another one from the list above.",
    "worker_lost": _LOST,
    "worker_unreachable": _LOST,
    "upstream_lost": _LOST,
    "upstream_refused": "The model refused this question. Please rephrase it, or ask for a shorter answer.",
    "upstream_key": _SET_UP,
    "worker_refused": _SET_UP,
    "worker_failed": "The model could not answer this. Your image is fine; please ask again or rephrase the question.",
    "internal": "The server could not process this. Please ask again; if it fails again, tell the person who runs it.",
    "image_too_large": _TOO_LARGE,
    "body_too_large": _TOO_LARGE,
    "image_decode_failed": "The server could not read this image: its decoder failed. Please export it again.",
    "image_decode_timeout": "The image takes too long to read; it may be damaged. Please export it again.",
    "bad_image": "The server could not read this image. Please load it again.",
    "prompt_too_long": _TOO_LONG,
    OVERFLOW: _TOO_LONG,
    "deadline": "The answer took longer than this server allows and was stopped. Please ask for a shorter answer.",
    "bad_key": "The model server refused the web UI: the access key is wrong. Tell the person who runs it.",
    "unsupported": "This model cannot show where it looked.",
    # Codes of the web UI itself.
    "no_controller": "The model server cannot be reached. Tell the person who runs it.",
    "silent": "The server has stopped answering. Please try again soon.",
    "no_model": "No model is chosen. Please choose one from the list above; if it is empty, no model is running.",
    "no_image": "No image is loaded. Please load one or choose an example, then ask.",
    "no_question": "Please write a question first.",
    "image_in_question": "The question contains “<image>”, which has a special meaning to the model. Please remove it.",
    "no_answer": "There is no answer yet. Ask a question first.",
    "cannot_sample": "This model's server cannot give several answers to one question. Nothing was compared.",
    "still_answering": "The model is still answering. Wait until it has finished, or press “Stop”.",
    "session_lost": "The server was restarted and has lost your image and conversation. Please reload this tab.",
    "session_gone": "The server no longer has the image and the conversation of this tab. Please load the image again.",
    "upload_too_large": "The file is larger than the limit of {limit_mb} MB. Export a single image from it.",
    "uploads_busy": "Other people are loading large files right now. Please try again in a minute.",
    "upload_broken": "The upload was incomplete. Please check the connection and try again.",
    "bad_event": "This tab sent something that the server does not understand. Please reload the tab.",
    "upload_gone": "The uploaded file has expired. Please load it again.",
    "empty_file": "The file is empty (0 bytes). Please export it again.",
    "not_an_image": "This file is neither an image (PNG, JPEG, TIFF, WebP, BMP, GIF) nor a readable DICOM file.",
    "bad_dicom": "This is a DICOM file, but its image cannot be read: it is damaged or in an unsupported format.",
    "dicom_without_image": "This DICOM file contains no image: it may be a report, a plan or a DICOMDIR.",
    "dicom_unsupported": "This DICOM file cannot be shown: {detail}. Export it uncompressed or as a PNG.",
    "dicom_without_decoder": "This server cannot decompress this DICOM file. Export it uncompressed.",
    "damaged_image": "The image file is damaged or cut off. Please export it again.",
    "too_many_pixels": "The image has too many pixels. Please load a smaller version of it.",
    "odd_shape": "The image is a very thin strip, which the model cannot use. Please load another one.",
    # Codes of a study.
    "study_too_large": "Together, these files are larger than 512 MB. Load one series at a time.",
    "study_too_many": "There are more than 5000 files. Load one series at a time.",
    "study_empty": "None of these files is an image that can be read here.",
    "study_gone": "The uploaded images have expired. Please load them again.",
    "directory_alone": "A DICOMDIR only lists other files. Load the folder that contains it.",
    "zip_damaged": "The ZIP archive is damaged or in an unsupported format. Please create it again.",
    "zip_bomb": "The ZIP archive would unpack to an implausible size. Please load the files themselves.",
    "bad_window": "Level and width can be at most 1,000,000, and the width at least 1. Nothing was changed.",
    "second_tab": "This tab is a copy of another one, so it starts a new conversation. The other tab keeps its own.",
    "map_canceled": "Canceled. The model has stopped computing where it looked.",
    "map_lost": "The model stopped while it computed where it looked. Please try again.",
    "map_left": "Computing where it looked was stopped because this tab was closed, reloaded or lost its connection.",
    "empty_report": "The report draft is empty. Write something, or add the answers to it.",
    "report_needs_dicom": "The image is not a DICOM file, so no DICOM report can refer to it. Save it as text or HTML.",
    "no_dicom_writer": "This server cannot write DICOM reports: the extra “pacs” is not installed. Use text or HTML.",
    # Codes of the PACS.
    "pacs_no_query": "Please enter a patient ID, an accession number or a study date.",
    "pacs_date": "Please write the study date like 2024-05-31, or two dates with “to” between them.",
    "pacs_wildcard": "Please enter the complete number: *, ? and \\ are not allowed.",
    "pacs_unreachable": "The PACS cannot be reached. Please try again, or tell the person who runs this server.",
    "pacs_credentials": "The PACS refuses this server’s credentials. Tell the person who runs this server.",
    "pacs_refused": "The PACS refused the request. Tell the person who runs this server.",
    "pacs_not_dicomweb": "The PACS did not answer as DICOMweb requires. Tell the person who runs this server.",
    "pacs_no_images": "This series contains no images.",
    "pacs_not_from_here": "The image did not come from a PACS, so there is nowhere to store the answer.",
    "pacs_cannot_keep": "No series from this PACS is loaded, so none can be kept. Untick the box and try again.",
    "pacs_read_only": "This PACS is set up for reading only. Nothing was stored.",
    "pacs_no_report": "Nothing was stored: the image lacks attributes that a report needs.",
    "odd_region": "The region is too small or too thin for the model. Draw a larger box. Nothing was changed.",
    "no_consent": "Nothing was saved. Tick the box that allows it first.",
    "no_verdict": "Nothing was saved. Choose whether the answer was good, or write a comment.",
    "feedback_full": "The feedback could not be saved: the server's file is full. Tell the person who runs it.",
    "not_saved": "The feedback could not be saved on the server. Tell the person who runs it.",
}


def model_gone(model: str) -> str:
    """Said while the chosen model is not running."""
    return (
        f"The model “{model}” is no longer running. It stays chosen, and no other model answers in its place. "
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
