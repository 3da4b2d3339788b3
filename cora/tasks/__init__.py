"""Real tasks to quantise: pretrained networks with calibration data and a metric."""

from cora.tasks.base import Task
from cora.tasks.data import DataNotFoundError
from cora.tasks.registry import TaskStatus, available_tasks, resolve_task
from cora.tasks.user import UserTask, load_object

__all__ = [
    "DataNotFoundError",
    "Task",
    "TaskStatus",
    "UserTask",
    "available_tasks",
    "load_object",
    "resolve_task",
]
