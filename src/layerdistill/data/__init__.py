"""From a recipe's `data` section to batches: tasks, sources, labels, tokenising, packing, collating."""

from layerdistill.data.all_rows import all_rows
from layerdistill.data.calibration import CALIBRATION, CalibrationConfig, set_aside
from layerdistill.data.collate import Collator, filler_for
from layerdistill.data.config import DataConfig
from layerdistill.data.fingerprint import fingerprint_dataset
from layerdistill.data.labels import LabelSpace, label_space
from layerdistill.data.load import load_splits
from layerdistill.data.streamed import streamed_blocks
from layerdistill.data.tasks import TASKS, Task, get_task
from layerdistill.data.tokenise import tokenise
from layerdistill.data.tokenizer import open_tokenizer
from layerdistill.data.trim_vocabulary import TrimmedVocabulary, trim_tokenizer
from layerdistill.data.trimmed_splits import trimmed_splits
from layerdistill.data.vocabulary import VocabularyCheck, compare_vocabularies

__all__ = [
    "CALIBRATION",
    "TASKS",
    "CalibrationConfig",
    "Collator",
    "DataConfig",
    "LabelSpace",
    "Task",
    "TrimmedVocabulary",
    "VocabularyCheck",
    "all_rows",
    "compare_vocabularies",
    "filler_for",
    "fingerprint_dataset",
    "get_task",
    "label_space",
    "load_splits",
    "open_tokenizer",
    "set_aside",
    "streamed_blocks",
    "tokenise",
    "trim_tokenizer",
    "trimmed_splits",
]
