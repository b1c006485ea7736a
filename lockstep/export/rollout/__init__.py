"""RL rollouts: what is trained, live in an engine that generates, bit for bit, and proof that it is there."""

from lockstep.export.rollout.audit import AuditError, AuditReport
from lockstep.export.rollout.engine import (
    Completion,
    EngineUnusable,
    LiveLayer,
    RolloutEngine,
    Sampling,
    checksum,
    checksums_of,
)
from lockstep.export.rollout.session import RolloutSession, SyncError, SyncReport

__all__ = [
    "AuditError",
    "AuditReport",
    "Completion",
    "EngineUnusable",
    "LiveLayer",
    "RolloutEngine",
    "RolloutSession",
    "Sampling",
    "SyncError",
    "SyncReport",
    "checksum",
    "checksums_of",
]
