"""A report draft: assembled from answers, edited by the user, exported as text, HTML or DICOM SR. No Gradio."""

from __future__ import annotations

import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass

from babydoctor import __version__
from babydoctor.schema import UserError
from babydoctor.serve.page import html as show
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.texts import NOT_CLINICAL, RESEARCH_NOTICE, PageError

MAX_SECTION_CHARS = 20_000

SHORT_ANSWER_WORDS = 4
"""A shorter answer ("Yes.") is copied with its question, because it means nothing without it."""


@dataclass(frozen=True)
class ReportDraft:
    """The text of the draft."""

    technique: str
    findings: str
    impression: str

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section."""
        named = (("Technique", self.technique), ("Findings", self.findings), ("Impression", self.impression))
        return [(title, (text or "").strip()[:MAX_SECTION_CHARS]) for title, text in named]

    def check(self) -> None:
        """Raises ``PageError`` if the draft is empty."""
        if not any(text for _, text in self.sections):
            raise PageError("empty_report")


def add_answer(text: str, exchange: Exchange) -> str:
    """The section with one more line, or unchanged if it already contains the line.

    Raises:
        PageError: the question got no answer.
    """
    answer = exchange.answer.strip()
    if not answer:
        raise PageError("no_answer")
    line = f"{exchange.question} {answer}" if len(answer.split()) < SHORT_ANSWER_WORDS else answer
    text = (text or "").rstrip()
    if line in text:
        return text
    return f"{text}\n{line}".lstrip()


def assemble(draft: ReportDraft, session: Session) -> ReportDraft:
    """The draft with the conversation added to it. Nothing that the user wrote is removed.

    "Technique" names image, views and models. "Findings" gets every answer. "Impression" gets the last answer, if it
    is empty.

    Raises:
        PageError: there is no answer yet.
    """
    answered = [each for each in session.exchanges if each.answer.strip() and each.ended]
    if not answered:
        raise PageError("no_answer")
    findings = draft.findings
    for exchange in answered:
        findings = add_answer(findings, exchange)
    return ReportDraft(
        technique=(draft.technique or "").strip() or describe_technique(answered),
        findings=findings,
        impression=(draft.impression or "").strip() or add_answer("", answered[-1]),
    )


def describe_technique(exchanges: Sequence[Exchange]) -> str:
    """One line per image and model: which image the model was given."""
    return "\n".join(dict.fromkeys(f"{each.source}." for each in exchanges))


def as_text(draft: ReportDraft) -> str:
    """Plain text, with a research notice in the first and last line."""
    parts = [NOT_CLINICAL, RESEARCH_NOTICE]
    parts += [f"{title.upper()}\n{text}" for title, text in draft.sections if text]
    return "\n\n".join([*parts, f"{_origin()}\n{NOT_CLINICAL}"]) + "\n"


def as_html(draft: ReportDraft, session: Session) -> str:
    """One HTML document with the images that the model received."""
    views = list(dict.fromkeys(each.view for each in session.exchanges))
    sections = [(title, text) for title, text in draft.sections if text]
    return show.report(sections, views, _origin())


def as_dicom(draft: ReportDraft, session: Session) -> bytes:
    """A DICOM structured report about the loaded image, for a PACS. It contains the patient attributes of that image.

    Raises:
        PageError: the image is not a DICOM file or lacks attributes, or the server cannot write reports.
    """
    from babydoctor.serve.page.pacs.report import build_draft_report

    scan, view = session.scan, session.view
    if scan is None or scan.dicom is None:
        raise PageError("report_needs_dicom")
    models = ", ".join(dict.fromkeys(each.model for each in session.exchanges)) or "no model was asked"
    texts = {title: text for title, text in draft.sections if text}
    caption = (view.caption if view else "") or "as stored"
    try:
        report = build_draft_report(scan.dicom.dataset, sections=texts, model=models, view=caption, frame=scan.frame)
    except ImportError:
        raise PageError("no_dicom_writer") from None
    except UserError:  # the error's text may quote the file
        raise PageError("pacs_no_report") from None
    buffer = io.BytesIO()
    report.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _origin() -> str:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    return f"Draft written with BabyDoctor {__version__}, {now}. Not checked by a radiologist."
