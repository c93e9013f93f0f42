"""Random input for all that takes bytes from strangers: frames, HTTP, manifests, settings, metadata.

``python -m tests.fuzz --frames N --requests N --seed N`` runs it for long, ``tests/test_fuzz.py`` briefly. What it
found is kept as tests of its own beside those of the module in question.
"""
