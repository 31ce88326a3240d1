"""What to fine-tune for: what to load, data, forward pass, loss and metrics."""

from autopeft.tasks.base import Batch, Task, TaskData
from autopeft.tasks.causal_lm import CausalLM
from autopeft.tasks.text_classification import TextClassification

__all__ = ["Batch", "CausalLM", "Task", "TaskData", "TextClassification"]
