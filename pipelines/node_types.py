"""What pods can get of a cloud's A100 machines: a part of each belongs to the kubelet and the system.

Sizes are those of the clouds' documentation. Reserved memory and cores are published as formulas by GKE and
AKS; on EKS they depend on the number of pods, and Karpenter keeps a share of the memory besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vitpipe.contracts.graph import Resources

# What runs beside a task on its node: the cloud's daemons, and the two containers that Kubeflow adds to a
# pod.
_DAEMON_CPUS, _DAEMON_MEMORY_GIB = 0.9, 1.5
# Kubelet evicts pods below 100 MiB.
_EVICTION_GIB = 0.1
# Reserved share of each further part of the memory, as GKE and AKS state it: 25 % of the first 4 GiB, ...
_MEMORY_STEPS = ((4.0, 0.25), (4.0, 0.20), (8.0, 0.10), (112.0, 0.06), (float("inf"), 0.02))
_CPU_STEPS = ((1.0, 0.06), (1.0, 0.01), (2.0, 0.005), (float("inf"), 0.0025))
# EKS: 255 MiB and 11 MiB per pod; a node of this size takes 737 pods. Karpenter plans with 7.5 % less memory
# than the instance has (VM_MEMORY_OVERHEAD_PERCENT).
_EKS_RESERVED_GIB = (255 + 11 * 737) / 1024
_KARPENTER_SHARE = 0.075


@dataclass(frozen=True)
class NodeType:
    """One machine: GPUs, and the cores and memory that pods can ask for."""

    gpus: int
    cpus: float
    memory_gib: float
    gpu_memory_gib: int

    def misfit(self, resources: Resources) -> str:
        """What a task asks for that this machine never has, in words; empty if it fits."""
        cpus, memory = self.cpus - _DAEMON_CPUS, self.memory_gib - _DAEMON_MEMORY_GIB
        parts = []
        if resources.gpus > self.gpus:
            parts.append(f"{resources.gpus} GPUs of {self.gpus}")
        if resources.cpus > cpus:
            parts.append(f"{resources.cpus:g} cores of {cpus:.1f}")
        if resources.memory_gib > memory:
            parts.append(f"{resources.memory_gib:g} GiB of {memory:.1f}")
        return ", ".join(parts)


def _stepwise(size: float, steps: tuple[tuple[float, float], ...]) -> float:
    reserved = 0.0
    for width, share in steps:
        reserved += min(size, width) * share
        size = max(size - width, 0.0)
    return reserved


def _by_formula(gpus: int, cpus: int, memory_gib: int, gpu_memory_gib: int) -> NodeType:
    memory = memory_gib - _stepwise(memory_gib, _MEMORY_STEPS) - _EVICTION_GIB
    return NodeType(gpus, cpus - _stepwise(cpus, _CPU_STEPS), memory, gpu_memory_gib)


def _on_eks(gpus: int, cpus: int, memory_gib: int, gpu_memory_gib: int) -> NodeType:
    memory = memory_gib * (1 - _KARPENTER_SHARE) - _EKS_RESERVED_GIB - _EVICTION_GIB
    return NodeType(gpus, cpus - _stepwise(cpus, _CPU_STEPS), memory, gpu_memory_gib)


NODE_TYPES: Mapping[str, NodeType] = MappingProxyType(
    {
        # Google: A100 of 40 GB, A100 of 80 GB.
        "a2-highgpu-1g": _by_formula(1, 12, 85, 40),
        "a2-highgpu-2g": _by_formula(2, 24, 170, 40),
        "a2-highgpu-4g": _by_formula(4, 48, 340, 40),
        "a2-highgpu-8g": _by_formula(8, 96, 680, 40),
        "a2-megagpu-16g": _by_formula(16, 96, 1360, 40),
        "a2-ultragpu-1g": _by_formula(1, 12, 170, 80),
        "a2-ultragpu-2g": _by_formula(2, 24, 340, 80),
        "a2-ultragpu-4g": _by_formula(4, 48, 680, 80),
        "a2-ultragpu-8g": _by_formula(8, 96, 1360, 80),
        # Amazon.
        "p4d.24xlarge": _on_eks(8, 96, 1152, 40),
        "p4de.24xlarge": _on_eks(8, 96, 1152, 80),
        # Microsoft.
        "Standard_ND96asr_v4": _by_formula(8, 96, 900, 40),
        "Standard_ND96amsr_A100_v4": _by_formula(8, 96, 1900, 80),
    }
)
