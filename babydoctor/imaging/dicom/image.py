"""A DICOM image with a parsed header, and the facts about it that do not identify a person."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from babydoctor.imaging.dicom.header import PixelLayout
from babydoctor.imaging.dicom.safety import reading_values
from babydoctor.imaging.dicom.values import numbers, text
from babydoctor.imaging.windows import Window

# Keywords of attributes that may identify a person, an institution or a time: those of DICOM PS3.15 2024, table E.1-1
# (basic application level confidentiality profile), that occur in image files.
_IDENTIFYING = """
AccessionNumber AcquisitionDate AcquisitionDateTime AcquisitionTime AdditionalPatientHistory AdmissionID
AdmittingDate AdmittingDiagnosesDescription Allergies AcquisitionComments BranchOfService CassetteID
ClinicalTrialSubjectID ConfidentialityConstraintOnPatientDataDescription ContentCreatorName ContentDate ContentTime
ContrastBolusAgent CountryOfResidence CurrentPatientLocation DerivationDescription DetectorID DeviceSerialNumber
DeviceUID EthnicGroup FrameOfReferenceUID GantryID ImageComments InstanceCoercionDateTime InstanceCreationDate
InstanceCreationTime InstitutionAddress InstitutionCodeSequence InstitutionName InstitutionalDepartmentName
InterpretationAuthor InterpretationRecorder IssuerOfPatientID LastMenstrualDate MedicalAlerts MedicalRecordLocator
MilitaryRank NameOfPhysiciansReadingStudy Occupation OperatorIdentificationSequence OperatorsName OrderEnteredBy
OtherPatientIDs OtherPatientIDsSequence OtherPatientNames PatientAddress PatientAge PatientBirthDate
PatientBirthName PatientBirthTime PatientComments PatientID PatientInstitutionResidence PatientMotherBirthName
PatientName PatientReligiousPreference PatientSex PatientSexNeutered PatientSize PatientState
PatientTelephoneNumbers PatientWeight PerformedProcedureStepDescription PerformedProcedureStepID
PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformingPhysicianName PhysiciansOfRecord PlateID
PregnancyStatus ProtocolName ReasonForStudy ReferencedPatientSequence ReferencedStudySequence
ReferringPhysicianAddress ReferringPhysicianName ReferringPhysicianTelephoneNumbers RegionOfResidence
RequestAttributesSequence RequestedProcedureDescription RequestedProcedureID RequestingPhysician RequestingService
ResponsibleOrganization ResponsiblePerson SOPInstanceUID ScheduledPerformingPhysicianName
ScheduledProcedureStepDescription SeriesDate SeriesDescription SeriesInstanceUID SeriesTime ServiceEpisodeID
SmokingStatus SourceImageSequence SpecialNeeds StationName StudyComments StudyDate StudyDescription StudyID
StudyInstanceUID StudyTime TextComments TextString TimezoneOffsetFromUTC VerifyingObserverName VisitComments
"""
IDENTIFYING_TAGS: tuple[str, ...] = tuple(_IDENTIFYING.split())

_CODE_STRING = re.compile(r"[A-Z0-9 _\-]{1,16}")  # the CS value representation, PS3.5 6.2; free text never fits


@dataclass(frozen=True)
class DicomImage:
    """An image object with its header parsed.

    ``pixel_spacing`` is (row, column) in mm of the first frame. ``windows`` are the first frame's own, in the file's
    order. ``warnings`` say what was unclear in the header and how it was interpreted. ``dataset`` and ``data`` (the
    file) hold everything else, including the patient's name, so ``repr`` does not show them.
    """

    name: str
    layout: PixelLayout
    modality: str
    pixel_spacing: tuple[float, float] | None
    windows: tuple[Window, ...]
    warnings: tuple[str, ...]
    dataset: Any = field(repr=False, compare=False)
    data: bytes = field(repr=False, compare=False)

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def columns(self) -> int:
        return self.layout.columns

    @property
    def num_frames(self) -> int:
        return self.layout.num_frames

    @property
    def photometric(self) -> str:
        return self.layout.photometric

    @property
    def is_gray(self) -> bool:
        return self.layout.photometric in ("MONOCHROME1", "MONOCHROME2")


def harmless_facts(dicom: DicomImage) -> dict[str, Any]:
    """Facts that may be shown or logged: nothing from ``IDENTIFYING_TAGS``, no free text, no UIDs, no private tags.

    This is an allow-list, so new or private attributes are never shown. Text must have the form of a DICOM code
    string.
    """
    with reading_values(dicom.name):
        return _harmless_facts(dicom)


def _harmless_facts(dicom: DicomImage) -> dict[str, Any]:
    dataset = dicom.dataset
    facts: dict[str, Any] = {
        "modality": dicom.modality,
        "rows": dicom.rows,
        "columns": dicom.columns,
        "num_frames": dicom.num_frames,
        "photometric": dicom.photometric,
        "body_part": text(dataset, "BodyPartExamined").upper(),
        "view": text(dataset, "ViewPosition"),
        "laterality": text(dataset, "ImageLaterality") or text(dataset, "Laterality"),
        "burned_in_annotation": text(dataset, "BurnedInAnnotation"),
    }
    facts = {k: v for k, v in facts.items() if not isinstance(v, str) or _CODE_STRING.fullmatch(v)}
    thickness = [n for n in numbers(dataset, "SliceThickness") if math.isfinite(n)]
    if dicom.pixel_spacing:
        facts["pixel_spacing_mm"] = dicom.pixel_spacing
    if thickness:
        facts["slice_thickness_mm"] = thickness[0]
    if dicom.windows:
        facts["windows"] = [(window.center, window.width) for window in dicom.windows]
    return facts


def identifying_tags(dicom: DicomImage) -> tuple[str, ...]:
    """Keywords of the ``IDENTIFYING_TAGS`` that have a value in the file, also in nested items. Never their values."""
    found: set[str] = set()
    wanted = frozenset(IDENTIFYING_TAGS)
    with reading_values(dicom.name):
        for element in dicom.dataset.iterall():
            if element.keyword in wanted and element.value not in (None, "", []):
                found.add(element.keyword)
    return tuple(sorted(found))
