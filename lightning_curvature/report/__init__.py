"""What people see: pictures, the page of a run, and what a file holds.

Nothing is imported here: ``inspection`` works without the extras that pictures and pages need.
"""
