"""The GPU time of a call by group of kernels.

A kernel belongs to the first group whose pattern matches its name, or else to `other`. The largest kernels of `other`
are printed, so that the patterns can be kept up to date.
"""

import re
from collections.abc import Callable

import torch

GROUPS = (  # the first match counts: collectives and this package's kernels before the general patterns
    ("collectives", r"nccl"),
    ("cross attention", r"_cross_attention"),
    ("prepare q, k, v", r"_row_rms|_norm_rope|_v_statistics|_key_sample|_finish_statistics|_quantise_|_v_shift"),
    ("row operations", r"^_(norm|activation|rms|residual)_kernel"),
    ("self-attention", r"attention|flash|fmha|sdpa"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|scaled_mm|wgmma|xmma|splitk"),
    ("elementwise and copies", r"elementwise|memcpy|memset|copy|cat|fill|reduce|layer_norm|triton_"),
)
OTHER = "other"


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    for group, pattern in GROUPS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return group
    return OTHER


def gpu_breakdown(call: Callable[[], object]) -> tuple[dict[str, float], str]:
    """(group → seconds of GPU time in one call, the largest kernels without a group). If the driver forbids profiling:
    (empty, the reason), so that a missing profile does not fail a measurement."""
    try:
        return _profiled(call)
    except RuntimeError as error:
        return {}, f"no profile: {error}"


def _profiled(call: Callable[[], object]) -> tuple[dict[str, float], str]:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    groups: dict[str, float] = {}
    unknown: dict[str, float] = {}
    for event in trace.key_averages():
        spent = event.self_device_time_total / 1e6
        if spent <= 0:
            continue
        group = group_of(event.key)
        groups[group] = groups.get(group, 0.0) + spent
        if group == OTHER:
            unknown[event.key] = spent
    largest = sorted(unknown.items(), key=lambda item: -item[1])[:3]
    return groups, "; ".join(f"{name[:60]} {1000 * spent:.1f} ms" for name, spent in largest)
