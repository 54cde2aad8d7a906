"""Batched decoding for many users at once. Independent of HTTP.

``request.py`` holds the caller's types and ``engine.py`` the public ``Engine``, whose thread runs ``core.py``.
``scheduler.py`` chooses the work of each step, ``layout.py`` arranges its rows, and ``decoder.py`` runs the forward
pass over the slots of ``kv_cache.py``. ``sequence.py`` and ``tokens/`` turn one request's logits into text.
"""
