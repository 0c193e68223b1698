"""Example configurations for ``lightning-curvature fit`` and ``validate``."""
