"""The engine's step on a CPU as one compiled operator."""
