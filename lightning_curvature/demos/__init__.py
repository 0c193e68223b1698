"""Demos: the main job on embedded data, as code to copy."""
