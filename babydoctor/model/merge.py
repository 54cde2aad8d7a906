"""``babydoctor merge``: merge a run's LoRA into plain weights, with one decoder layer in memory at a time.

A LoRA that was trained on a 4-bit base is merged into the dequantized base, because those are the weights it was
trained on. The float base before quantization differs.

The merged run is written to ``OUT.partial``, which is renamed to ``OUT`` once it is complete and has passed the check.
After each shard ``merge.json`` records the progress, so the same command continues an interrupted merge.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from babydoctor.data.tokens import load_tokenizer
from babydoctor.files import LOCK_FILE, DirectoryLock, explain_full_disk, sync, write_json
from babydoctor.model.familiarity import FILE_NAME as FAMILIARITY_FILE
from babydoctor.model.language_model import LanguageWeights
from babydoctor.model.layer_probe import LayerProbe, group_by_layer
from babydoctor.model.run_dir import Manifest, read_manifest, resolve, write_manifest
from babydoctor.model.run_weights import RunWeights
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.model.weights import SHARD_BYTES, ShardWriter, copy_model_files, local_directory, weight_files
from babydoctor.progress import ByteProgress
from babydoctor.schema import UserError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of logits, relative to the largest logit, that rounding may cause."""

_STATE = "merge.json"


@dataclass(frozen=True)
class MergeReport:
    """How the merged model compares with the run: largest difference of logits, and largest logit."""

    difference: float
    scale: float


def merge_run(
    path: Path, out: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", shard_bytes: int = SHARD_BYTES
) -> MergeReport:
    """Write a run directory with plain weights that needs no base, no adapter and no bitsandbytes.

    This needs memory for one decoder layer in float32 and the embeddings. At the end a prompt is run layer by layer
    through the run, with its LoRA not merged, and through the written weights. Their logits must agree.

    Args:
        dtype: the dtype of the written weights; None: the run's.
        shard_bytes: a shard is closed after the decoder layer that reaches this size.

    Raises:
        UserError: ``out`` exists, another process merges into it, the disk is full, or the logits differ.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    manifest = read_manifest(path)
    job = _Merge(path, manifest, out, dtype or manifest.torch_dtype, device, shard_bytes)
    job.partial.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(job.partial)
    lock.acquire()
    hint = f"{job.partial} keeps what is finished. Free some space and run the same command again, or delete it"
    try:
        with explain_full_disk("the merged model", job.partial, hint):
            before = job.write_language_model()
            job.write_other_files()
            report = job.compare(before)
            lock.release()
            job.finish()
    finally:
        lock.release()
    return report


class _Merge:
    """One merge, which may continue an interrupted one."""

    def __init__(
        self, path: Path, manifest: Manifest, out: Path, dtype: torch.dtype, device: str, shard_bytes: int
    ) -> None:
        self.path, self.manifest, self.out, self.dtype, self.device = path, manifest, out, dtype, device
        self.shard_bytes = shard_bytes
        self.partial = out.with_name(out.name + ".partial")
        self.target = self.partial / "language_model"
        self.base = Path(local_directory(resolve(path, manifest.language_model)))
        self.tower = Path(local_directory(resolve(path, manifest.vision_tower)))
        self.weights = RunWeights(path, manifest, device=device)
        self.tied = bool(self.weights.config.tie_word_embeddings)
        self.groups = group_by_layer(self.weights.shapes)
        self.num_done = 0

    def write_language_model(self) -> torch.Tensor:
        """Write all shards that do not exist yet.

        Returns:
            The run's logits ``[T, V]`` for the probe's prompt.
        """
        probe = LayerProbe(self.weights.config, self.device)
        writer = self._open(probe)
        sizes = [sum(self._size(name) for name in group) for group in self.groups]
        self._check_space(sum(sizes[self.num_done :]))
        try:
            with ByteProgress("Merging the language model", sum(sizes)) as progress:
                progress.skip(sum(sizes[: self.num_done]))
                for index in range(self.num_done, len(self.groups)):
                    base = {name: self.weights.read_base(name) for name in self.groups[index]}
                    self._advance(probe, base, index)
                    for name in self.groups[index]:
                        writer.write(name, self.weights.merge(name, base.pop(name)).to(self.dtype))
                    progress.advance(sizes[index])
                    if writer.shard_size >= self.shard_bytes or index == len(self.groups) - 1:
                        writer.finish_shard()
                        self._record(index + 1, writer.shards, probe)
        except BaseException:
            writer.abandon()
            raise
        writer.close()
        assert probe.logits is not None
        return probe.logits.cpu()

    def write_other_files(self) -> None:
        """Write configuration, tokenizer, tower, projector and manifest."""
        dtype = str(self.dtype).removeprefix("torch.")
        config = self.weights.config.to_dict()
        config.update(dtype=dtype, architectures=[self.weights.architecture])
        write_json(self.target / "config.json", config)
        load_tokenizer(self.base).save_pretrained(str(self.target))
        generation = self.base / "generation_config.json"  # names the end tokens
        if generation.is_file():
            shutil.copyfile(generation, self.target / generation.name)
        copy_model_files(self.tower, self.partial / "vision_tower")
        shutil.copy2(self.path / "projector.safetensors", self.partial)
        if (familiarity := self.path / FAMILIARITY_FILE).is_file():
            shutil.copy2(familiarity, self.partial)  # it depends on the tower only
        changes: dict[str, Any] = {
            "language_model": "./language_model",
            "vision_tower": "./vision_tower",
            "dtype": dtype,
            "quantization": "none",
            "base_adapters": (),
        }
        write_manifest(self.partial, self.manifest.model_copy(update=changes))

    def compare(self, before: torch.Tensor) -> MergeReport:
        """Read the written weights back and compare their logits with the run's.

        Raises:
            UserError: they differ by more than rounding. The written weights are deleted in this case.
        """
        written = LanguageWeights(self.target, dtype=self.dtype, device=self.device)
        probe = LayerProbe(written.config, self.device)
        with ByteProgress("Checking the merged weights", sum(map(self._size, self.weights.shapes))) as progress:
            for group in self.groups:
                weights = {name: written.read(name) for name in group}
                if self.tied and "model.norm.weight" in weights:
                    weights["lm_head.weight"] = written.read("model.embed_tokens.weight")
                probe.advance(weights)
                progress.advance(sum(map(self._size, group)))
        assert probe.logits is not None
        report = MergeReport(float((probe.logits.cpu() - before).abs().max()), float(before.abs().max()))
        if not report.difference <= TOLERANCE[self.dtype] * report.scale:
            shutil.rmtree(self.partial)
            raise UserError(
                f"the merged weights do not match {self.path}: logits differ by up to {report.difference:.3g}, and the "
                f"largest logit is {report.scale:.3g}. Merge with --dtype float32, which rounds least."
            )
        return report

    def finish(self) -> None:
        """Give the directory its final name."""
        for file in self.partial.rglob("*"):
            sync(file)
        sync(self.partial)
        self.partial.rename(self.out)
        # Deleted last, because an interrupted merge needs them to continue.
        for name in (_STATE, self._probe_file(self.num_done).name):
            (self.out / name).unlink()
        sync(self.out.parent)

    def _open(self, probe: LayerProbe) -> ShardWriter:
        """Start a merge, or continue an interrupted one of the same run with the same settings."""
        key = self._key()
        state_file = self.partial / _STATE
        if not any(file.name != LOCK_FILE for file in self.partial.iterdir()):
            self.target.mkdir()
            write_json(state_file, {"key": key, "num_done": 0, "shards": []})
        if not state_file.is_file():
            raise UserError(f"{self.partial} exists and is not an unfinished merge; move it or choose another --out")
        state = json.loads(state_file.read_text(encoding="utf-8"))
        if state["key"] != key:
            raise UserError(
                f"{self.partial} holds an unfinished merge of another run, or with other settings; delete it or choose "
                "another --out"
            )
        # The writer must not close shards by size. They end with a decoder layer, so that the merge can continue there.
        writer = ShardWriter(self.target, shard_bytes=2**62)
        self.num_done = state["num_done"]
        if self.num_done:
            text = f"continuing in {self.partial}: {self.num_done} of {len(self.groups)} parts are done"
            print(text, file=sys.stderr)
            writer.reuse(state["shards"])
            saved = load_tensors(self._probe_file(self.num_done))
            probe.hidden = saved["hidden"].to(self.device)
            probe.logits = saved.get("logits")
        return writer

    def _record(self, num_done: int, shards: list[list[str]], probe: LayerProbe) -> None:
        """Record that the first ``num_done`` groups are in finished shards."""
        assert probe.hidden is not None
        saved = {"hidden": probe.hidden.cpu().contiguous()}
        if probe.logits is not None:
            saved["logits"] = probe.logits.cpu().contiguous()
        save_tensors(saved, self._probe_file(num_done))
        write_json(self.partial / _STATE, {"key": self._key(), "num_done": num_done, "shards": shards})
        self._probe_file(self.num_done).unlink(missing_ok=True)
        self.num_done = num_done

    def _probe_file(self, num_done: int) -> Path:
        """The file with the probe's state after ``num_done`` groups: hidden states, and the logits at the end."""
        return self.partial / f"merge-{num_done}.safetensors"

    def _advance(self, probe: LayerProbe, base: dict[str, torch.Tensor], index: int) -> None:
        if self.tied and index == len(self.groups) - 1:
            base = {**base, "lm_head.weight": self.weights.read_base("model.embed_tokens.weight")}
        probe.advance(base, self.weights.update)

    def _size(self, name: str) -> int:
        return torch.Size(self.weights.shapes[name]).numel() * self.dtype.itemsize

    def _check_space(self, num_bytes: int) -> None:
        num_bytes += sum(file.stat().st_size for file in weight_files(self.tower))
        free = shutil.disk_usage(self.partial).free
        if free < num_bytes:
            raise UserError(
                f"merging takes {num_bytes / 1e9:.1f} GB in {self.partial.parent}, where {free / 1e9:.1f} GB are free; "
                "free some space or choose an --out on another disk"
            )

    def _key(self) -> dict[str, Any]:
        """Everything the result depends on: the run, size and time of its source files, and the settings."""
        sources = [*weight_files(self.base)]
        adapters = [self.path / "adapter", *(Path(resolve(self.path, name)) for name in self.manifest.base_adapters)]
        for adapter in adapters:
            sources += sorted(adapter.glob("adapter_*"))
        stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sources]
        return {
            "manifest": self.manifest.model_dump(mode="json"),
            "sources": stamps,
            "dtype": str(self.dtype),
            "shard_bytes": self.shard_bytes,
        }
