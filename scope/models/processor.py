"""A model's processor, from its folder: transformers' own, put together of the parts that the workbench uses.

Gemma 4's wants a part for videos as well, which wants torchvision; videos are not read here, so it goes without. The
tokenizer is a copy of the model's, since processors add tokens to theirs.
"""

import copy
from pathlib import Path
from typing import Any

from scope.errors import InvalidInputError
from scope.models.loading import quiet_transformers

__all__ = ["MEDIA_TYPES", "PROCESSED", "load_processor"]

MEDIA_TYPES = {"gemma3": "Gemma3Processor", "gemma4": "Gemma4Processor"}
"""transformers' `config.model_type` of models whose media are read, and the class of their processor. Each has been
held equal to transformers' own forward pass in a test."""
PROCESSED = ("processor_config.json", "preprocessor_config.json")
"""Files that say how media are prepared."""
PARTS = {"image_processor": "AutoImageProcessor", "feature_extractor": "AutoFeatureExtractor"}
NOT_READ = "video_processor"


def load_processor(folder: Path, tokenizer: Any, model_type: str) -> Any:
    """The processor of a model.

    Args:
        folder: of the model.
        tokenizer: the model's.
        model_type: one of `MEDIA_TYPES`.

    Raises:
        InvalidInputError: there is none in the folder, or it cannot be loaded.
    """
    import transformers

    if not any((folder / name).is_file() for name in PROCESSED):
        raise InvalidInputError(
            f"{folder} holds no processor, so media cannot be read; expected {' or '.join(PROCESSED)} there."
        )
    kind = _without_videos(getattr(transformers, MEDIA_TYPES[model_type]))
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            settings, _ = kind.get_processor_dict(folder, **local)
            parts = {
                name: getattr(transformers, PARTS[name]).from_pretrained(folder, **local)
                for name in kind.get_attributes()
                if name in PARTS
            }
            own = {"tokenizer": copy.deepcopy(tokenizer), NOT_READ: None}
            return kind.from_args_and_dict([{**parts, **own}[name] for name in kind.get_attributes()], settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InvalidInputError(f"The processor in {folder} cannot be loaded: {error}") from error


def _without_videos(kind: Any) -> Any:
    """A processor class that may lack its part for videos."""
    if NOT_READ not in kind.get_attributes():
        return kind

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == NOT_READ and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideos
