"""BabyDoctor: a radiology vision-language model that one person can train and serve on one 24 GB GPU."""

__version__ = "0.1.0"
