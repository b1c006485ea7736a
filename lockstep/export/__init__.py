"""What was trained, for engines: `save_pretrained` a folder, `stream` to a live engine, read a `Checkpoint` back."""

from lockstep.export import formats
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.directory import ExportError
from lockstep.export.legality import check_exportable
from lockstep.export.save import save_pretrained, stream

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExportError",
    "check_exportable",
    "formats",
    "save_pretrained",
    "stream",
]
