"""DICOM -> RGB, and what of a DICOM file may be told without telling whose it is.

The order is the standard's (PS3.3 C.11, PS3.4 N.2): modality LUT, then VOI LUT or window, then presentation.
Free of torch; pydicom is imported where it is used, because it takes a third of a second.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from babydoctor.imaging.dicom_safety import check_deflated, codestream_size, reading_values
from babydoctor.imaging.load import MAX_PIXELS, check_size
from babydoctor.imaging.windows import CT_PRESETS, Window, apply_window
from babydoctor.schema import UserError

# Attributes that name or lead to a person, an institution or a time: the part of DICOM PS3.15 2024, table E.1-1
# (basic application level confidentiality profile), that image files carry in practice, by keyword.
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

# Transfer syntaxes whose decoder is an extra package, for the message when it is missing.
_DECODER_HINT = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"

_GREY = ("MONOCHROME1", "MONOCHROME2")
_CODE_STRING = re.compile(r"[A-Z0-9 _\-]{1,16}")  # the CS value representation, PS3.5 6.2; free text never fits


@dataclass(frozen=True)
class DicomImage:
    """An image object with its header parsed and its pixels not yet decoded.

    ``pixel_spacing`` is (row, column) in mm. ``windows`` are the file's own, in its order. ``dataset`` holds
    everything else, the patient's name included, so it is kept out of ``repr``.
    """

    name: str
    num_frames: int
    rows: int
    columns: int
    modality: str
    photometric: str
    pixel_spacing: tuple[float, float] | None
    windows: tuple[Window, ...]
    dataset: Any = field(repr=False, compare=False)


def read_dicom(source: str | Path | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> DicomImage:
    """Read the header of a DICOM image; ``name`` stands for the file in messages when ``source`` is bytes.

    Raises ``UserError`` where it is no DICOM, holds no image, or a frame has more than ``max_pixels`` pixels.
    """
    import pydicom

    if isinstance(source, bytes):
        name, data = name or f"DICOM of {len(source)} bytes", source
    else:
        name = name or str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})", code="image_missing") from error
    check_deflated(data, name, max_pixels)
    with reading_values(name):
        return _parse(pydicom.dcmread(io.BytesIO(data), force=True), name, max_pixels)


def _parse(dataset: Any, name: str, max_pixels: int) -> DicomImage:
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = str(dataset.get("Modality") or "") or "no DICOM object"
        raise UserError(
            f"{name}: holds no image ({kind}); give a DICOM file with pixel data", code="dicom_without_image"
        )
    if not rows or not columns:
        raise UserError(
            f"{name}: the DICOM header gives no size (Rows {rows}, Columns {columns})", code="dicom_unreadable"
        )
    check_size(columns, rows, name, max_pixels)
    if num_frames < 1:
        raise UserError(f"{name}: NumberOfFrames is {num_frames}", code="dicom_unreadable")
    return DicomImage(
        name=name,
        num_frames=num_frames,
        rows=rows,
        columns=columns,
        modality=str(dataset.get("Modality") or ""),
        photometric=str(dataset.get("PhotometricInterpretation") or "MONOCHROME2"),
        pixel_spacing=_pixel_spacing(dataset),
        windows=_windows(dataset, 0),
        dataset=dataset,
    )


def _functional_group(dataset: Any, frame: int, keyword: str) -> Any:
    """The item of a functional group sequence (enhanced multi-frame, PS3.3 C.7.6.16): per frame, else shared."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    groups = ([per_frame[frame]] if frame < len(per_frame) else []) + list(
        dataset.get("SharedFunctionalGroupsSequence") or []
    )
    for group in groups:
        if group.get(keyword):
            return group[keyword][0]
    return None


def _numbers(value: Any) -> list[float]:
    """DICOM's one-or-many numbers as a list; what cannot be read as a number is left out."""
    if value is None or value == "":
        return []
    values = value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    try:
        return [float(item) for item in values if item not in (None, "")]
    except (TypeError, ValueError):
        return []


def _pixel_spacing(dataset: Any) -> tuple[float, float] | None:
    measures = _functional_group(dataset, 0, "PixelMeasuresSequence")
    for item, keyword in ((dataset, "PixelSpacing"), (measures, "PixelSpacing"), (dataset, "ImagerPixelSpacing")):
        values = _numbers(item.get(keyword)) if item is not None else []
        if len(values) == 2 and min(values) > 0:
            return values[0], values[1]
    return None


def _windows(dataset: Any, frame: int) -> tuple[Window, ...]:
    """The file's own windows. A width that the standard forbids makes a window useless, so it is left out."""
    item = dataset if "WindowCenter" in dataset else _functional_group(dataset, frame, "FrameVOILUTSequence")
    if item is None:
        return ()
    centers, widths = _numbers(item.get("WindowCenter")), _numbers(item.get("WindowWidth"))
    labels = item.get("WindowCenterWidthExplanation") or []
    labels = [labels] if isinstance(labels, str) else [str(label) for label in labels]
    function = str(item.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        function = "LINEAR"
    windows = []
    for index, (center, width) in enumerate(zip(centers, widths, strict=False)):
        label = labels[index] if index < len(labels) else f"window {index + 1} of {len(centers)} in the file"
        if width >= 1 or (width > 0 and function != "LINEAR"):
            windows.append(Window(center, width, label, function))  # type: ignore[arg-type]
    return tuple(windows)


def render(
    dicom: DicomImage,
    frame: int = 0,
    center: float | None = None,
    width: float | None = None,
    preset: str | None = None,
) -> Image.Image:
    """One frame as an RGB picture; where pixels are not square, it is stretched so that they are.

    Grey frames are shown under ``center`` and ``width``, or the CT ``preset``, or the file's first window or VOI
    LUT, or else a window made from the frame's own values. ``image.info["window"]`` says which.
    Raises ``UserError`` for a frame, window or preset that cannot be, or pixels that cannot be decoded.
    """
    with reading_values(dicom.name):
        return _render(dicom, frame, _chosen_window(dicom, center, width, preset))


def _render(dicom: DicomImage, frame: int, chosen: Window | None) -> Image.Image:
    values = _decode_frame(dicom, frame)
    if dicom.photometric in _GREY:
        grey, explanation = _to_grey(dicom, values, frame, chosen)
        image = Image.fromarray(grey).convert("RGB")
        image.info["window"] = explanation
        return _square_pixels(dicom, image)
    if chosen is not None:
        raise UserError(f"{dicom.name}: a colour image ({dicom.photometric}) has no window; leave it out")
    image = Image.fromarray(_to_color(dicom, values))
    image.info["window"] = "colour, as stored"
    return _square_pixels(dicom, image)


def _chosen_window(dicom: DicomImage, center: float | None, width: float | None, preset: str | None) -> Window | None:
    if preset is not None:
        if preset not in CT_PRESETS:
            raise UserError(f"window preset {preset!r}: must be one of {', '.join(CT_PRESETS)}")
        if dicom.modality != "CT":
            raise UserError(f"{dicom.name}: preset {preset!r} is for CT, this is {dicom.modality or 'unknown'}")
        if center is not None or width is not None:
            raise UserError(f"give either the preset {preset!r} or a centre and a width, not both")
        return CT_PRESETS[preset]
    if (center is None) != (width is None):
        raise UserError(f"window centre {center} and width {width}: give both or neither")
    if center is None or width is None:
        return None
    if not (np.isfinite(center) and np.isfinite(width) and width >= 1):
        raise UserError(f"window centre {center} and width {width}: the width must be at least 1")
    return Window(float(center), float(width), "chosen")


def _decode_frame(dicom: DicomImage, frame: int) -> np.ndarray:
    """Stored values of one frame, ``[rows, columns]`` or ``[rows, columns, 3]``; YBR is already turned into RGB."""
    from pydicom.pixels import pixel_array

    if not 0 <= frame < dicom.num_frames:
        raise UserError(f"{dicom.name}: frame {frame} does not exist; it has frames 0 to {dicom.num_frames - 1}")
    _check_codestream(dicom, frame)
    try:
        values = pixel_array(dicom.dataset, index=frame)
    except Exception as error:  # decoders raise nearly anything on damaged files
        text = " ".join(str(error).split())
        message = f"{dicom.name}: frame {frame} cannot be decoded ({text[:300]})"
        if _lacks_decoder(dicom):
            hint = f"{message}. A decoder is missing: {_DECODER_HINT}"
            raise UserError(hint, code="dicom_without_decoder") from error
        raise UserError(message, code="dicom_unreadable") from error
    if values.shape[:2] != (dicom.rows, dicom.columns):
        raise UserError(
            f"{dicom.name}: decodes to {values.shape}, the header says {dicom.rows} x {dicom.columns}",
            code="dicom_unreadable",
        )
    return values


def _check_codestream(dicom: DicomImage, frame: int) -> None:
    """A compressed frame brings a size of its own, and decoders obey that one: it must be the header's."""
    from pydicom.encaps import get_frame

    meta = getattr(dicom.dataset, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta is not None else None
    if syntax is None or not syntax.is_encapsulated:
        return
    size = codestream_size(get_frame(dicom.dataset.PixelData, frame, number_of_frames=dicom.num_frames))
    if size is not None and size != (dicom.columns, dicom.rows):
        raise UserError(
            f"{dicom.name}: frame {frame} is {size[0]} x {size[1]} inside, the DICOM header says "
            f"{dicom.columns} x {dicom.rows}",
            code="dicom_unreadable",
        )


def _lacks_decoder(dicom: DicomImage) -> bool:
    """True where no installed package decodes the file's transfer syntax."""
    from pydicom.pixels import get_decoder

    try:
        return not get_decoder(dicom.dataset.file_meta.TransferSyntaxUID).is_available
    except (AttributeError, NotImplementedError):
        return False


def _to_grey(dicom: DicomImage, stored: np.ndarray, frame: int, chosen: Window | None) -> tuple[np.ndarray, str]:
    """Modality LUT, window or VOI LUT, presentation. Returns uint8 ``[rows, columns]`` and how it was windowed."""
    from pydicom.pixels import apply_voi

    dataset = dicom.dataset
    values = _apply_modality_lut(dataset, stored, frame)
    padding = _padding_mask(dataset, stored)
    own = dicom.windows if frame == 0 else _windows(dataset, frame)
    window = chosen or (own[0] if own else None)
    if window is None and dataset.get("VOILUTSequence"):
        lut = dataset.VOILUTSequence[0]
        unit = apply_voi(values.astype(stored.dtype), dataset) / (2.0 ** int(lut.LUTDescriptor[2]) - 1)
        explanation = f"VOI LUT {lut.get('LUTExplanation') or ''}".strip()
    else:
        window = window or _window_of_values(dataset, values, padding, identity=values is stored)
        unit = apply_window(values, window)
        explanation = f"centre {window.center:g}, width {window.width:g} ({window.explanation})"
    if dicom.photometric == "MONOCHROME1":
        unit = 1 - unit
    if padding is not None:
        unit = np.where(padding, 0.0, unit)  # padding is background, also where low values are white
    return (np.clip(unit, 0, 1) * 255).round().astype(np.uint8), explanation


def _apply_modality_lut(dataset: Any, stored: np.ndarray, frame: int) -> np.ndarray:
    """Stored values -> the modality's units. Returns ``stored`` itself where the file asks for no change."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset)
    item = dataset if "RescaleSlope" in dataset else None
    item = item or _functional_group(dataset, frame, "PixelValueTransformationSequence")
    if item is None:
        return stored
    slope, intercept = _numbers(item.get("RescaleSlope")) or [1.0], _numbers(item.get("RescaleIntercept")) or [0.0]
    if (slope[0], intercept[0]) == (1.0, 0.0):
        return stored
    return stored.astype(np.float64) * slope[0] + intercept[0]


def _padding_mask(dataset: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where the scanner saw nothing: PixelPaddingValue, up to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = _numbers(dataset.get("PixelPaddingValue"))
    if not value:
        return None
    limit = _numbers(dataset.get("PixelPaddingRangeLimit")) or value
    low, high = sorted((value[0], limit[0]))
    return (stored >= low) & (stored <= high)


def _window_of_values(dataset: Any, values: np.ndarray, padding: np.ndarray | None, identity: bool) -> Window:
    """A window for a file that brings none."""
    bits = int(dataset.get("BitsStored") or 16)
    if identity and bits <= 8 and not dataset.get("PixelRepresentation"):
        top = 2.0**bits - 1
        return Window(top / 2, top, f"{bits}-bit values as stored", "LINEAR_EXACT")
    seen = values[~padding] if padding is not None else values.ravel()
    seen = seen[np.isfinite(seen)]
    if seen.size == 0:
        return Window(0.5, 1, "empty frame", "LINEAR_EXACT")
    low, high = (float(value) for value in np.percentile(seen, [0.5, 99.5]))
    explanation = "percentiles 0.5 to 99.5 of the frame; the file has no window"
    if high <= low:
        low, high = float(seen.min()), float(seen.max())
        explanation = "minimum to maximum of the frame; the file has no window"
    return Window((low + high) / 2, max(high - low, 1e-12), explanation, "LINEAR_EXACT")


def _to_color(dicom: DicomImage, values: np.ndarray) -> np.ndarray:
    """Colour frame -> uint8 ``[rows, columns, 3]``."""
    from pydicom.pixels import apply_color_lut

    bits = int(dicom.dataset.get("BitsStored") or 8)
    if dicom.photometric == "PALETTE COLOR":
        values = apply_color_lut(values, dicom.dataset)
        bits = values.dtype.itemsize * 8
    if values.ndim != 3 or values.shape[2] < 3:
        raise UserError(
            f"{dicom.name}: photometric interpretation {dicom.photometric!r} is not supported", code="dicom_unreadable"
        )
    if bits > 8:
        values = (values.astype(np.float64) / (2.0**bits - 1) * 255).round()
    return np.ascontiguousarray(values[..., :3].astype(np.uint8))


def _square_pixels(dicom: DicomImage, image: Image.Image) -> Image.Image:
    """Stretch the axis of the larger spacing: a reformatted CT with 3 mm slices would look squashed."""
    ratio = _numbers(dicom.dataset.get("PixelAspectRatio"))
    vertical, horizontal = dicom.pixel_spacing or ((ratio[0], ratio[1]) if len(ratio) == 2 else (1.0, 1.0))
    if min(vertical, horizontal) <= 0 or abs(vertical / horizontal - 1) < 0.01:
        return image
    finest = min(vertical, horizontal)
    size = (round(image.width * horizontal / finest), round(image.height * vertical / finest))
    check_size(*size, f"{dicom.name} with square pixels")
    stretched = image.resize(size, Image.Resampling.BILINEAR)
    stretched.info = dict(image.info)
    return stretched


def harmless_facts(dicom: DicomImage) -> dict[str, Any]:
    """What may be shown or logged: nothing from ``IDENTIFYING_TAGS``, no free text, no UIDs, no private tags.

    A list of what is allowed, so that a new or private attribute stays inside. Text is passed on only where it has
    the form of a DICOM code string.
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
        "body_part": str(dataset.get("BodyPartExamined") or "").strip().upper(),
        "view": str(dataset.get("ViewPosition") or "").strip(),
        "laterality": str(dataset.get("ImageLaterality") or dataset.get("Laterality") or "").strip(),
        "burned_in_annotation": str(dataset.get("BurnedInAnnotation") or "").strip(),
    }
    facts = {k: v for k, v in facts.items() if not isinstance(v, str) or _CODE_STRING.fullmatch(v)}
    thickness = _numbers(dataset.get("SliceThickness"))
    if dicom.pixel_spacing:
        facts["pixel_spacing_mm"] = dicom.pixel_spacing
    if thickness:
        facts["slice_thickness_mm"] = thickness[0]
    if dicom.windows:
        facts["windows"] = [(window.center, window.width) for window in dicom.windows]
    return facts


def identifying_tags(dicom: DicomImage) -> tuple[str, ...]:
    """Which of ``IDENTIFYING_TAGS`` the file carries with a value, nested items included. Keywords, never values."""
    found: set[str] = set()
    wanted = frozenset(IDENTIFYING_TAGS)
    with reading_values(dicom.name):
        for element in dicom.dataset.iterall():
            if element.keyword in wanted and element.value not in (None, "", []):
                found.add(element.keyword)
    return tuple(sorted(found))
