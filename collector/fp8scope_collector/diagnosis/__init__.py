"""Diagnosis: rules that read a run's rows and say which tensor goes wrong, since when, why, and what to do."""
