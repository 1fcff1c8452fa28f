"""Scores questions and answers: what published benchmarks ask, how texts are read, what figures come out.

Works on manifests before a run and on the rows of finished runs.
"""
