"""What is measured: one file a task; `task` says what all of them are."""
