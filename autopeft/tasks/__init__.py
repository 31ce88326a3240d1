"""What to fine-tune for: what to load, data, forward pass, loss and metrics."""

from autopeft.tasks.base import Batch, Task, TaskData
from autopeft.tasks.causal_lm import CausalLM
from autopeft.tasks.loader_data import LoaderData
from autopeft.tasks.text_classification import TextClassification

__all__ = ["Batch", "CausalLM", "LoaderData", "Task", "TaskData", "TextClassification"]
