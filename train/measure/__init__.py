"""Measurements: functions of (model, documents, inference mode)."""
