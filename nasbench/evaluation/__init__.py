"""Placement -> {task: score}. The modules of the built-in tasks register them when a task is looked up."""
