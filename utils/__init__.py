"""Provide command lines, checkpoint files, atomic writes and schedules; import no other room."""
