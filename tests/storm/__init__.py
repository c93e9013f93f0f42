"""A host under mixed load of many orgs, while a seeded agent kills, stops, starves and restarts all that it is made of.

``python -m tests.storm --seed N --minutes M`` runs it for long, ``tests/test_storm_e2e.py`` briefly.
"""
