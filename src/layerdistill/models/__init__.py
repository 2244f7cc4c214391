"""Models: load them, find their blocks, embeddings, final norm and head, and make students of them."""

from layerdistill.models.config import StudentConfig, TeacherConfig
from layerdistill.models.count import count_parameters
from layerdistill.models.eval_mode import evaluating
from layerdistill.models.fields import depths_from_config, widths_from_config
from layerdistill.models.load import LoadedModel, load_config, load_model, load_student
from layerdistill.models.locate import resolve_model_source
from layerdistill.models.new import new_config, new_model
from layerdistill.models.own_code import has_own_code, write_own_code
from layerdistill.models.positions import fewest_positions, ids_to_stay, positions
from layerdistill.models.shrink import block_sources, shrink_config
from layerdistill.models.structure import Stack, depths, find_embeddings, find_head, find_stacks, unwrap, widths
from layerdistill.models.student import freeze_embeddings, make_student
from layerdistill.models.tasks import empty_model
from layerdistill.models.to_dtype import to_dtype
from layerdistill.models.trim_embeddings import trim_config, trim_model

__all__ = [
    "LoadedModel",
    "Stack",
    "StudentConfig",
    "TeacherConfig",
    "block_sources",
    "count_parameters",
    "depths",
    "depths_from_config",
    "empty_model",
    "evaluating",
    "fewest_positions",
    "find_embeddings",
    "find_head",
    "find_stacks",
    "freeze_embeddings",
    "has_own_code",
    "ids_to_stay",
    "load_config",
    "load_model",
    "load_student",
    "make_student",
    "new_config",
    "new_model",
    "positions",
    "resolve_model_source",
    "shrink_config",
    "to_dtype",
    "trim_config",
    "trim_model",
    "unwrap",
    "widths",
    "widths_from_config",
    "write_own_code",
]
