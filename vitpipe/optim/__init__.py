"""Parameter groups, schedules (pure functions of the step), the optimiser."""
