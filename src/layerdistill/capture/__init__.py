"""Capture: take hidden states and logits out of models, live or cached, without changing them."""

from layerdistill.capture.hooks import Captured, capture
from layerdistill.capture.source import LiveTeacher, TeacherSource, run_model, student_signal

__all__ = ["Captured", "LiveTeacher", "TeacherSource", "capture", "run_model", "student_signal"]
