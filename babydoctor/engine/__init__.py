"""Batched decoding for many users at once. Knows nothing of HTTP.

``request.py`` is what callers need; ``engine.py`` the thread that owns the model; ``decoder.py`` LLaMA's forward pass
over KV slots (``kv.py``); ``job.py``, ``sampling.py`` and ``stops.py`` what happens to one request's tokens.
"""
