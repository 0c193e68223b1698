"""Peak memory of some work on the CPU."""

import gc

import torch


def peak_bytes(work):
    """Return how many bytes more than before are allocated at the worst moment of some work.

    benchmarks/support/measuring.py has the same for any device: tests and benchmarks do not import each other.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
