"""A report draft: assembled from answers, edited by the user, written as text, HTML or DICOM SR. No Gradio."""

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
"""A shorter answer ("Yes.") says nothing without its question."""


@dataclass(frozen=True)
class ReportDraft:
    """What the user has written."""

    technique: str
    findings: str
    impression: str

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each section."""
        named = (("Technique", self.technique), ("Findings", self.findings), ("Impression", self.impression))
        return [(title, (text or "").strip()[:MAX_SECTION_CHARS]) for title, text in named]

    def check(self) -> None:
        """Raises ``PageError`` if nothing is written."""
        if not any(text for _, text in self.sections):
            raise PageError("empty_report")


def add_answer(text: str, exchange: Exchange) -> str:
    """The section with one more line; unchanged if it holds the line already.

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
    """The draft with what the conversation adds to it. Nothing that the user wrote is removed.

    Technique names image, views and models; findings get every answer, an empty impression gets the last one.

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
    """Which images the model was given, and which model that was. One line for each."""
    return "\n".join(dict.fromkeys(f"{each.source}." for each in exchanges))


def as_text(draft: ReportDraft) -> str:
    """Plain text, marked as research first and last."""
    parts = [NOT_CLINICAL, RESEARCH_NOTICE]
    parts += [f"{title.upper()}\n{text}" for title, text in draft.sections if text]
    return "\n\n".join([*parts, f"{_origin()}\n{NOT_CLINICAL}"]) + "\n"


def as_html(draft: ReportDraft, session: Session) -> str:
    """One HTML document with the pictures that the model got."""
    views = list(dict.fromkeys(each.view for each in session.exchanges))
    sections = [(title, text) for title, text in draft.sections if text]
    return show.report(sections, views, _origin())


def as_dicom(draft: ReportDraft, session: Session) -> bytes:
    """A DICOM structured report about the loaded image, for a PACS. It holds the patient attributes of that image.

    Raises:
        PageError: the image is no DICOM file, lacks attributes, or the server cannot write reports.
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
    except UserError:  # its text may quote the file
        raise PageError("pacs_no_report") from None
    buffer = io.BytesIO()
    report.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _origin() -> str:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    return f"Draft written with BabyDoctor {__version__}, {now}. Not checked by a radiologist."
