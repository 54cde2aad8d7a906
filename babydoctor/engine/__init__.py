"""Batched decoding for many users at once. Independent of HTTP.

``request.py`` holds the caller's types, ``engine.py`` the thread that owns the model, ``scheduler.py`` the choice of
work for each step, ``layout.py`` the step's rows and ``decoder.py`` the model's forward pass over the slots of
``kv_cache.py``. ``sequence.py``, ``sampling.py`` and ``stops.py`` turn one request's logits into text.
"""
