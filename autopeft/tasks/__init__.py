"""What to fine-tune for: data, head, loss and metrics."""

from autopeft.tasks.base import Batch, Task, TaskData
from autopeft.tasks.text_classification import TextClassification

__all__ = ["Batch", "Task", "TaskData", "TextClassification"]
