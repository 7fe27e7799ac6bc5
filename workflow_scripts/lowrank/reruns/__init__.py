"""Why a job runs again: the fingerprint of the code that a stage can reach, and reasons in plain words.

Knows nothing of models or studies; imported by the rules, by `why.py`, and by nothing else of the library.
"""
