"""Names of series from closed vocabularies, because a series description is free text that may name a person."""

from __future__ import annotations

_MODALITIES = """
BI BMD CR CT DG DX EC ECG EPS ES GM HC IO IVOCT IVUS KER LEN LP LS MG MR NM OAM OCT OP OPM OPR OPT OPTBSV OPTENF
OPV OSS OT PA PET PT PX RF RG RTIMAGE SC SEG SM SMR ST TG US VA XA XC
"""
MODALITIES = frozenset(_MODALITIES.split())
"""Modalities of images, PS3.3 C.7.3.1.1.1 and some retired ones."""

_BODY_PARTS = """
ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS CALF
CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CHOROIDPLEXUS CIRCLEOFWILLIS CLAVICLE COCCYX
COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER
FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS ILEUM ILIUM IAC JAW JEJUNUM KIDNEY KNEE LARYNX LEG
LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE
ORBIT OVARY PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RADIUSULNA RECTUM RIB SCALP SCAPULA
SCLERA SCROTUM SHOULDER SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID
TIBIA TIBIAFIBULA TLSPINE TOE TONGUE TRACHEA TSPINE ULNA URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST
ZYGOMA
"""
BODY_PARTS = frozenset(_BODY_PARTS.split())
"""Body parts of PS3.16 annex L, table L-1, as BodyPartExamined states them."""

_PLANES = ("sagittal", "coronal", "axial")


def plane_of(normal: tuple[float, float, float] | None) -> str:
    """``axial``, ``coronal``, ``sagittal``, ``oblique``, or empty if the orientation is not known."""
    if normal is None:
        return ""
    sizes = [abs(value) for value in normal]
    main = max(range(3), key=sizes.__getitem__)
    return _PLANES[main] if sizes[main] > 0.9 else "oblique"


def series_label(modality: str, normal: tuple[float, float, float] | None, body_part: str, echo: int | None) -> str:
    """For example ``MR axial, BRAIN, echo 2``."""
    parts = [" ".join(part for part in (modality or "images", plane_of(normal)) if part)]
    parts += [body_part] if body_part else []
    parts += [f"echo {echo}"] if echo is not None else []
    return ", ".join(parts)
