"""What the page says when something does not work: one sentence or two for each case, in a clinician's words.

Nothing that a server or a library wrote is shown: it may quote a file, and it speaks to programmers.
"""

from __future__ import annotations

from babydoctor.serve.api.errors import OVERFLOW

_TOO_LONG = "The conversation has become too long for the model. Press “Clear chat” and ask again."
_TOO_LARGE = (
    "The image is too large for the server. Export it smaller, for example as a PNG of 2000 pixels, and load it."
)
_LOST = (
    "The model's program was lost before the answer was complete. Words that had already come are kept. "
    "Please ask again; if it happens again, tell the person who runs this server."
)

SENTENCES: dict[str, str] = {
    # From controller and worker, by the machine name of the error.
    "queue_full": "The model is busy with other people's questions. Please try again{when}.",
    "draining": "The server is about to restart. Please try again in a minute.",
    "no_worker": "No model is running at the moment. Please try again soon, or tell the person who runs this server.",
    "not_ready": "No model is running at the moment. Please try again soon, or tell the person who runs this server.",
    "model_not_found": "The chosen model is not available any more. Please choose another one from the list above.",
    "worker_lost": _LOST,
    "worker_unreachable": _LOST,
    "worker_failed": "The model failed at this question. Your image is fine; please ask again or word it differently.",
    "internal": "The server failed at this question. Please ask again; if it fails again, tell the person who runs it.",
    "image_too_large": _TOO_LARGE,
    "body_too_large": _TOO_LARGE,
    "bad_image": "The server could not read this image. Please load it again.",
    "prompt_too_long": _TOO_LONG,
    OVERFLOW: _TOO_LONG,
    "deadline": "The answer took longer than this server allows and was stopped. Please ask for a shorter answer.",
    "bad_key": "This page is not allowed to use the server: its access key is wrong. Tell the person who runs it.",
    "unsupported": "This model cannot show where it looked.",
    # Found out by the page itself.
    "no_controller": "The page cannot reach the server with the models. Tell the person who runs this page.",
    "silent": "The server has stopped answering. Please try again soon.",
    "no_model": "No model is chosen. Please choose one from the list above; if it is empty, no model is running.",
    "no_image": "There is no image yet. Please load one or choose an example, then ask.",
    "no_question": "Please write a question first.",
    "image_in_question": "The question holds the text “<image>”, which the model uses as a mark. Please leave it out.",
    "no_answer": "There is no answer yet. Ask a question first.",
    "still_answering": "The model is still answering. Wait for the end, or press “Stop” first.",
    "session_lost": "The connection to this page was interrupted and your image is forgotten. Please reload the page.",
    "upload_too_large": "The file is larger than {limit_mb} MB, the most this page takes. Export a single image of it.",
    "upload_broken": "The file did not arrive whole. Please check the connection and try again.",
    "upload_gone": "The file was not fetched in time. Please load it again.",
    "empty_file": "The file is empty (0 bytes). Please export it again.",
    "not_an_image": "This file is neither an image (PNG, JPEG, TIFF, WebP, BMP, GIF) nor a readable DICOM file.",
    "bad_dicom": "This is a DICOM file, but its image cannot be read: it is damaged or of an unusual kind.",
    "dicom_without_image": "This DICOM file holds no image: it may be a report, a plan or a DICOMDIR.",
    "dicom_without_decoder": "This server cannot read the compression of this DICOM file. Export it uncompressed.",
    "damaged_image": "The image file is damaged or cut off. Please export it again.",
    "too_many_pixels": "The image has too many pixels for this page. Please load a smaller version of it.",
    "odd_shape": "The image is a very thin strip, which the model cannot use. Please load another one.",
    "no_consent": "Nothing was saved: tick the box that allows it first.",
    "no_verdict": "Nothing was saved: choose whether the answer was good, or write a comment.",
    "not_saved": "The feedback could not be saved on the server. Tell the person who runs it.",
}


class PageError(Exception):
    """Something that the page tells its user. ``code`` is a key of ``SENTENCES``, or an unknown one of a server."""

    def __init__(self, code: str, *, retry_after_s: float | None = None, limit_mb: int | None = None) -> None:
        super().__init__(code)
        self.code = code
        when = "in a few moments" if not retry_after_s else f"in about {retry_after_s:.0f} seconds"
        general = "The server could not answer this request. Please try again; if it fails again, tell who runs it."
        self.sentence = SENTENCES.get(code, general).format(when=f" {when}", limit_mb=limit_mb)
