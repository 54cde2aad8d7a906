"""An answer or a report draft as a DICOM structured report, marked as research and not for clinical use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from babydoctor.imaging.dicom.safety import reading_values
from babydoctor.serve.page.texts import RESEARCH_NOTICE

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SERIES_DESCRIPTION = "BabyDoctor research result - NOT FOR CLINICAL USE"
SERIES_NUMBER = 9901


def build_report(source: Dataset, *, question: str, answer: str, model: str, view: str, frame: int = 0) -> Dataset:
    """A Comprehensive SR (PS3.3 A.35.3) with one question and one answer about one image.

    The report is partial and unverified. It belongs to the study of the source image and refers to that image. Patient
    and study attributes are copied from the image, because a PACS needs them to file the report.

    Args:
        source: the image's data set.
        question: the user's question.
        answer: the model's answer.
        model: name of the model.
        view: how the image was shown to the model: frame, window, hidden text.
        frame: index of the frame in a multi-frame image.

    Raises:
        ImageError: the image lacks an attribute that the standard requires.
    """
    import highdicom as hd

    question_name = hd.sr.CodedConcept("question", "99BABYDOCTOR", "Question to the research model")
    answer_name = hd.sr.CodedConcept("answer", "99BABYDOCTOR", "Answer of the research model")
    return _build(source, [(question_name, question), (answer_name, answer)], model=model, view=view, frame=frame)


def build_draft_report(
    source: Dataset, *, sections: Mapping[str, str], model: str, view: str, frame: int = 0
) -> Dataset:
    """A report draft about one image as a Comprehensive SR, see ``build_report``.

    Args:
        sections: text by title: ``Technique``, ``Findings``, ``Impression``.

    Raises:
        ImageError: the image lacks an attribute that the standard requires.
    """
    from pydicom.sr.codedict import codes

    names = {
        "Technique": codes.DCM.ProcedureDescription,
        "Findings": codes.DCM.Finding,
        "Impression": codes.DCM.Impression,
    }
    texts = [(names[title], text) for title, text in sections.items()]
    return _build(source, texts, model=model, view=view, frame=frame)


def _build(source: Dataset, texts: Sequence[tuple[Any, str]], *, model: str, view: str, frame: int) -> Dataset:
    """A report that contains ``texts``, each a coded name and a text."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name="BabyDoctor", manufacturer_name="BabyDoctor", model_name=model
        ),
    )
    contains = hd.sr.RelationshipTypeValues.CONTAINS
    root = hd.sr.ContainerContentItem(
        name=codes.LN.DiagnosticImagingReport, is_content_continuous=False, template_id=None
    )
    language = hd.sr.LanguageOfContentItemAndDescendants(hd.sr.CodedConcept("en", "RFC5646", "English"))
    items: list[Any] = [*language, *observer]
    texts = [
        (codes.DCM.Comment, f"NOT FOR CLINICAL USE. {RESEARCH_NOTICE}"),
        *texts,
        (codes.DCM.Comment, f"Image as shown to the model: {view}"),
    ]
    items += [hd.sr.TextContentItem(name=name, value=text, relationship_type=contains) for name, text in texts]
    with warnings.catch_warnings(), reading_values("the image"):
        warnings.simplefilter("ignore")  # highdicom's warnings may quote a patient's name
        items.append(
            hd.sr.ImageContentItem(
                name=codes.DCM.SourceImage,
                referenced_sop_class_uid=str(source.SOPClassUID),
                referenced_sop_instance_uid=str(source.SOPInstanceUID),
                referenced_frame_numbers=[frame + 1] if int(source.get("NumberOfFrames") or 1) > 1 else None,
                relationship_type=contains,
            )
        )
        root.ContentSequence = hd.sr.ContentSequence(items)
        report = hd.sr.ComprehensiveSR(
            evidence=[source],
            content=root,
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="BabyDoctor",
            is_complete=False,
            is_verified=False,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            manufacturer_model_name=model,
            software_versions=version("babydoctor"),
            series_description=SERIES_DESCRIPTION,
        )
    report.SpecificCharacterSet = "ISO_IR 192"
    return report
