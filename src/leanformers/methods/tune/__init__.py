"""Methods that train: for the task, or with few parameters."""
