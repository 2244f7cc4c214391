"""Capture: take hidden states and logits out of models, live or cached, without changing them."""

from layerdistill.core.types import TeacherSource
from layerdistill.signals.hooks import Captured, capture
from layerdistill.signals.live_teacher import LiveTeacher
from layerdistill.signals.source import run_model, student_signal

__all__ = ["Captured", "LiveTeacher", "TeacherSource", "capture", "run_model", "student_signal"]
