"""Import what a training process imports, and end: its peak is what Python and the libraries take by themselves."""

from __future__ import annotations

if __name__ == "__main__":
    import babydoctor.model.run_dir
    import babydoctor.train.loop  # noqa: F401
