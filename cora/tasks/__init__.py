"""Real tasks to quantise: pretrained networks with calibration data and a metric."""

from cora.tasks.base import Task
from cora.tasks.data import DataNotFoundError
from cora.tasks.pages import Page, draw_page, read_page, render_page
from cora.tasks.registry import TaskStatus, available_tasks, resolve_task
from cora.tasks.user import UserTask, load_object

__all__ = [
    "DataNotFoundError",
    "Page",
    "Task",
    "TaskStatus",
    "UserTask",
    "available_tasks",
    "draw_page",
    "load_object",
    "read_page",
    "render_page",
    "resolve_task",
]
