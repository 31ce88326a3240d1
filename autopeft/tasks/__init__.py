"""What to fine-tune for: what to load, data, forward pass, loss and metrics."""

from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.audio_classification import AudioClassification
from autopeft.tasks.base import Batch, Task, TaskData
from autopeft.tasks.causal_lm import CausalLM
from autopeft.tasks.image_classification import ImageClassification
from autopeft.tasks.loader_data import LoaderData
from autopeft.tasks.multi_label_classification import MultiLabelClassification
from autopeft.tasks.preference_optimization import PreferenceOptimization
from autopeft.tasks.regression import Regression
from autopeft.tasks.seq2seq import Seq2Seq
from autopeft.tasks.speech_recognition import SpeechRecognition
from autopeft.tasks.text_classification import TextClassification
from autopeft.tasks.token_classification import TokenClassification

TASKS: tuple[type[Task], ...] = (
    ImageClassification,
    SpeechRecognition,
    AudioClassification,
    PreferenceOptimization,
    Seq2Seq,
    TokenClassification,
    MultiLabelClassification,
    Regression,
    TextClassification,
    CausalLM,
)
"""The tasks there are, which YAML names by their class. `autopeft init` takes the first that fits data."""

__all__ = [
    "TASKS",
    "AudioClassification",
    "Batch",
    "CausalLM",
    "HeadSpec",
    "ImageClassification",
    "LoaderData",
    "MultiLabelClassification",
    "Objective",
    "PreferenceOptimization",
    "Regression",
    "Seq2Seq",
    "SpeechRecognition",
    "Task",
    "TaskData",
    "TextClassification",
    "TokenClassification",
]
